"""The stages of a run, one record each, and what follows from the records. Imports nothing but the standard library.

Graph, status, plan, pipeline and slurm/table2.sh all read these records. To add a stage: a record here, and a module of
the same name in halo/stages/ with `run(context)`; for users a launcher, and for Slurm a script.

    python -m halo.graph preset 8b      # the preset of a size
    python -m halo.graph jobs 8b        # the scripts of a whole conversion, in order: stage, then script
    python -m halo.graph training       # the stages that train on token shards
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Seen = Literal["rnn", "attention", "heldout", "needles"]
Model = Literal["teacher", "student"]

RUN_CONFIG = "config.toml"
"""In a run's folder: the resolved settings."""
STAGE_RECORD = "stage.json"
"""In a stage's folder, once it is finished (halo/run.py)."""

TRAINING_DATA, HELD_OUT_TEXT = "training data", "held-out text"
"""In stage.json: the keys of the digests of what a stage read."""
NEEDLE_RECIPE = 2
"""The number of the way in which needle samples are made (halo/data/needle.py). Raised when it changes, so that what
was made or measured in another way is not taken for today's."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is known of a stage without running it."""

    name: str
    """Also the name of its module in halo/stages/, of its table in a preset, and of its folder in a run."""
    inputs: tuple[str, ...] = ()
    """The stages whose results it reads."""
    launcher: str
    """Its file in launcher/."""
    script: str = ""
    """The file in slurm/ that runs it, perhaps with other stages. {size} stands for the teacher's size. Empty: none."""
    sees: tuple[Seen, ...] = ()
    """Settings that its result depends on, beside its own table and its inputs: the RNN mixer and its switches ("rnn"),
    the switches of attention layers ("attention"), the text to measure on ("heldout"), the recipe of needle samples
    ("needles")."""
    models: tuple[Model, ...] = ()
    """The models that it runs. What it makes or trains, or what was made, is the student."""
    trains: bool = False
    costed: bool = False
    """Whether the report (Table 2) shows what it cost."""
    conversion: bool = True
    """Whether it is part of converting a teacher. Pretraining is not: it makes one."""

    def script_for(self, size: str) -> str:
        return self.script.format(size=size)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(name="pretrain", launcher="pretrain.py", models=("student",), trains=True, conversion=False),
        Stage(
            name="align",
            launcher="align.py",
            script="stage1_{size}.sh",
            sees=("rnn",),
            models=("teacher", "student"),
            trains=True,
            costed=True,
        ),
        Stage(
            name="selection",
            inputs=("align",),
            launcher="selection.py",
            script="selection_{size}.sh",
            sees=(
                "rnn",
                "heldout",
                "needles",
            ),  # it replaces single layers of the teacher: no attention layer of the hybrid
            models=("teacher", "student"),
            costed=True,
        ),
        Stage(
            name="distill",
            inputs=("align", "selection"),
            launcher="kd.py",
            script="stage2_{size}.sh",
            sees=("rnn", "attention"),
            models=("teacher", "student"),
            trains=True,
            costed=True,
        ),
        # From here on the architecture is the input's.
        Stage(
            name="finetune",
            inputs=("distill",),
            launcher="finetune.py",
            script="stage3_{size}.sh",
            models=("student",),
            trains=True,
            costed=True,
        ),
        Stage(
            name="scaling",
            inputs=("finetune",),
            launcher="scaling.py",
            script="export.sh",
            sees=("heldout", "needles"),
            models=("student",),
            costed=True,
        ),
        Stage(name="export", inputs=("finetune", "scaling"), launcher="export.py", script="export.sh"),
        Stage(
            name="niah",
            inputs=("export",),
            launcher="niah.py",
            script="niah.sh",
            sees=("heldout", "needles"),
            models=("teacher", "student"),
        ),
        Stage(name="csr", inputs=("export",), launcher="csr.py", script="csr.sh", models=("teacher", "student")),
    )
}
"""Every stage by its name, each after its inputs."""

SIZES = {"2b": "hypenet-2b", "4b": "hypenet-5b", "8b": "hypenet-9b"}
"""The size of a teacher, which is in the names of its scripts, and the preset that converts it."""


def conversion() -> list[Stage]:
    """The stages from a teacher to the evaluated hybrid, in order."""
    return [stage for stage in STAGES.values() if stage.conversion]


def stages_to(stage: str, prepare: bool) -> list[str]:
    """The stages that a command for `stage` runs: itself, and with `prepare` first all that it needs, in order."""
    return [*(_needed(stage) if prepare else []), stage]


def _needed(stage: str) -> list[str]:
    """All stages whose results `stage` needs, directly or through others, in order."""
    needed = set(STAGES[stage].inputs)
    for name in reversed(STAGES):
        if name in needed:
            needed |= set(STAGES[name].inputs)
    return [name for name in STAGES if name in needed]


def jobs(size: str) -> dict[str, str]:
    """A whole conversion on Slurm, in order: script -> the last of the stages that it runs."""
    return {stage.script_for(size): stage.name for stage in conversion() if stage.script}


def main(words: Sequence[str]) -> int:
    """Answer slurm/table2.sh; returns the exit status."""
    match list(words):
        case ["preset", size] if size in SIZES:
            print(SIZES[size])
        case ["jobs", size] if size in SIZES:
            print("\n".join(f"{stage} {script}" for script, stage in jobs(size).items()))
        case ["training"]:
            print("\n".join(stage.name for stage in conversion() if stage.trains))
        case ["preset" | "jobs", size]:
            print(f"error: no teacher of size '{size}': it is one of {', '.join(SIZES)}", file=sys.stderr)
            return 2
        case _:
            print("usage: python -m halo.graph preset SIZE | jobs SIZE | training", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
