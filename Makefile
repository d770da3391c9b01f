# `make` lists the targets. Everything is installed into .venv, once, and again when pyproject.toml changes.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# What deepspeed starts (python, and ninja where it builds) must be .venv's too.
WITH_PATH = PATH="$(CURDIR)/$(BIN):$$PATH"

.DEFAULT_GOAL := help
.PHONY: help install demo teacher test compat soak check

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile

install: $(INSTALLED) ## create .venv and install the project into it

# pip would compile on one core. Some files are templates, and no Python.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: add PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --no-compile -e '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@touch $@

# DeepSpeed's launcher would take 29500, where another command of it may wait.
FREE_PORT = $$($(BIN)/python -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')

demo: install ## convert the embedded teacher, all stages, and show what the hybrid remembers
	$(WITH_PATH) deepspeed --quiet --num_gpus 1 --master_port $(FREE_PORT) launcher/convert.py --until niah

teacher: install ## remake the embedded teacher from its preset
	$(WITH_PATH) deepspeed --master_port $(FREE_PORT) launcher/pretrain.py --preset tiny --run runs/tiny-teacher

test: install ## run the tests
	$(WITH_PATH) OMP_NUM_THREADS=1 python -m pytest -n 2

# The resolver picks transformers 4 (pyproject.toml says why). The model code also runs on 5: here on the oldest and on
# the newest that the registry has today, each in a folder of its own, with what .venv has where that fits. Tests of
# kernels and recurrences, in which transformers has no part, do not run again.
OLDEST5 := 5.0.0
THEIRS := transformers huggingface-hub tokenizers
OF_THE_MODEL := cache common_forward common_weights configuration every_mixer export modeling peers published trainers \
	transfer transfer_whole

compat: install ## run the model's tests on transformers 5, the oldest and the newest there is
	@newest=$$($(BIN)/python -m pip index versions transformers 2>/dev/null | sed -n '1s/.*(\(.*\))/\1/p') && \
	test -n "$$newest" || { echo "compat: the registry names no newest transformers" >&2; exit 1; } && \
	$(MAKE) --no-print-directory compat-$(OLDEST5) compat-$$newest

compat-%: install
	test -d .venv/transformers-$* || { \
		$(BIN)/python -m pip list --format freeze --exclude-editable $(THEIRS:%=--exclude %) >.venv/constraints.txt && \
		$(BIN)/python -m pip install --quiet --no-compile --no-warn-conflicts --target .venv/transformers-$*.part \
			-c .venv/constraints.txt transformers==$* && \
		mv .venv/transformers-$*.part .venv/transformers-$*; }
	$(WITH_PATH) OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.venv/transformers-$* \
		python -m pytest -q -n 2 $(OF_THE_MODEL:%=tests/hypenet/test_%.py)

soak: install ## kill a preparation of data and a training run 20 times each, and compare them with ones that were not
	$(WITH_PATH) OMP_NUM_THREADS=1 python -m tests.halo.data.soak_preparation --kills 20
	$(WITH_PATH) OMP_NUM_THREADS=1 python -m tests.distributed.soak --steps 60 --kills 20

check: install ## lint, format check, types and shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x slurm/*.sh .ci/run
