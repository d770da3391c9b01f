"""The launchers' command line: what it becomes, and what `--help` and `--version` say."""

import os
import subprocess
import sys
from dataclasses import MISSING
from importlib.metadata import version
from pathlib import Path

import pytest

from halo import __version__, cli
from halo.errors import UserError
from halo.graph import conversion
from halo.job import Job
from halo.options import settings, type_name
from halo.preset import load_config, preset_table
from halo.tables import config_table, to_toml, toml_value
from tests.launcher.conftest import ROOT

EVERY = [(f"launcher/{stage.launcher}", ("", "architecture", stage.name)) for stage in conversion()]
EVERY += [
    ("launcher/pretrain.py", ("pretrain",)),
    (
        "launcher/convert.py",
        ("", "architecture", "align", "selection", "distill", "finetune", "scaling", "niah", "csr"),
    ),
    ("launcher/plan.py", ("", "architecture", "pretrain", "align", "distill", "finetune")),
    ("data/prepare_fineweb_edu.py", ("", "align", "distill", "finetune")),
]
HEAVY = ("torch", "transformers", "deepspeed", "numpy")


def light(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher, which fails if it imports a heavy package before it ends."""
    check = (
        "import runpy, sys\n"
        f"sys.argv = {[script, *words]!r}\n"
        "try:\n"
        f"    runpy.run_path({script!r}, run_name='__main__')\n"
        "finally:\n"
        f"    assert not set({HEAVY!r}) & sys.modules.keys()\n"
    )
    return subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """What a stage's launcher makes of words."""

    def run(*words: str, stage: str | None = "distill") -> Job:
        monkeypatch.setattr(sys, "argv", ["kd.py", *words])
        monkeypatch.chdir(tmp_path)
        return cli._read_job(cli._job_parser("", stage), cli.GENERAL, stage)

    return run


@pytest.mark.parametrize(("script", "tables"), EVERY, ids=[script for script, _ in EVERY])
def test_help_lists_every_key_of_the_stage_and_imports_nothing_heavy(script, tables):
    done = light(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.split())
    _, preset = preset_table("tiny")
    for setting in settings():
        if setting.table not in tables:
            assert f"--{setting.key} " not in words
            continue
        value = setting.value_in(preset)
        value = setting.default if value is MISSING else value
        default = "{}" if isinstance(value, dict) else toml_value(value)
        _, _, explained = words.partition(f"--{setting.key} ")
        line = f"{setting.doc} (type: {type_name(setting.kind)}, default: {default})"
        assert explained.partition(" ")[2].replace(" ", "").startswith(line.replace(" ", ""))


def test_help_shows_the_values_of_the_preset_and_of_the_run(tmp_path):
    nine = light("launcher/align.py", "--preset", "hypenet-9b", "--help")
    assert "(type: int, default: 20000)" in " ".join(nine.stdout.split())
    assert "The defaults are those of preset hypenet-9b. " in nine.stdout
    (tmp_path / "config.toml").write_text(to_toml(config_table(load_config("tiny", ["--align.steps", "77"]))))
    run = light("launcher/align.py", "--run", str(tmp_path), "--help")
    assert "(type: int, default: 77)" in " ".join(run.stdout.split())
    assert f"The defaults are those of the run ({tmp_path / 'config.toml'})." in run.stdout


@pytest.mark.parametrize("script", ["launcher/kd.py", "launcher/convert.py", "launcher/pretrain.py"])
def test_a_misspelt_key_is_told_before_anything_heavy_is_imported(script):
    done = light(script, "--distill.lrr", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --distill.lrr is an unknown key (did you mean 'lr'?)\n"


@pytest.mark.parametrize("script", ["launcher/kd.py", "launcher/status.py", "data/prepare_fineweb_edu.py"])
def test_the_version(script):
    done = light(script, "--version")
    assert done.stdout.startswith(f"hypenet-halo {__version__} (torch {version('torch')}, ")


def test_a_checkout_that_is_not_installed_knows_its_version(tmp_path):
    """Its packages alone, on PYTHONPATH: preparing shards asks for the version, too."""
    code = (
        "import importlib.metadata as metadata\n"
        "real = metadata.distribution\n"
        "def distribution(name):\n"
        "    if name == 'hypenet-halo':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.distribution = distribution\n"
        "from pathlib import Path\n"
        "from halo.cli import version_line\n"
        "from halo.data.packing import Part\n"
        "from halo.data.preparation import prepare\n"
        "from halo.models.tokenizer import load_tokenizer, train_tokenizer\n"
        "text = 'one two three four five six ' * 50\n"
        "Path('text.txt').write_text(text)\n"
        "tokenizer = train_tokenizer([text], 260)\n"
        "done = prepare(Path('text.txt'), tokenizer, Path('out'), {'a': Part(seq_len=8, tokens=8)}, workers=1)\n"
        "print(done['a']['version'], version_line())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.split()[:3]) == (0, [__version__, "hypenet-halo", __version__]), done.stderr


def test_a_command_line_becomes_a_job(typed):
    job = typed()
    assert (job.config, job.run) == (load_config("tiny"), Path("runs/tiny"))
    assert job.stages == ("align", "selection", "distill")
    assert (job.taken_from, job.taken_stages) == (None, ())
    words = ["--preset", "hypenet-2b", "--from", "runs/x", "align", "selection", "--align.lr", "1", "--ds-config", "j"]
    job = typed(*words, "--name", "mine")
    assert (job.config.align.lr, job.run, job.ds_config, job.stages) == (
        1.0,
        Path("runs/mine"),
        Path("j"),
        ("distill",),
    )
    assert (job.taken_from, job.taken_stages) == (Path("runs/x"), ("align", "selection"))


def test_a_command_for_all_stages_becomes_a_job(typed):
    job = typed("--preset", "smollm2-135m", "--text", "books", "--finetune.corpus.source", "papers", stage=None)
    assert job.stages == tuple(stage.name for stage in conversion())
    sources = [getattr(job.config, stage).corpus.source for stage in ("align", "distill", "finetune")]
    assert (job.config.heldout, sources) == ("books", ["books", "books", "papers"])
    assert typed("--until", "selection", stage=None).stages == ("align", "selection")
    with pytest.raises(UserError, match=r"^--until: no stage 'distil' \(did you mean 'distill'\?\); stages: align, "):
        typed("--until", "distil", stage=None)


def test_settings_of_other_stages_are_accepted(typed):
    assert typed("--niah.seed", "5", "--pretrain.steps", "7").config.niah.seed == 5


def test_a_run_remembers_and_its_settings_are_checked_with_what_is_typed(typed, tmp_path):
    """The preset alone would not go with a decay."""
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    wsd = ["--distill.schedule", "wsd", "--distill.decay", "5"]
    (run / "config.toml").write_text(to_toml(config_table(load_config("tiny", wsd))))
    assert typed("--distill.decay", "9").config.distill.decay == 9


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prepar"], "no option --prepar (did you mean 'prepare'?): --help lists them"),
        (["--preset"], "--preset: expected one argument"),
        (["--from", "runs/x"], "--from runs/x names no stage: write --from runs/x STAGE ..., of align, selection, "),
        (["--from", "runs/x", "algn"], "--from: no stage 'algn' (did you mean 'align'?); stages: align, "),
        (["--from", "a", "align", "--from", "b", "selection"], "--from is given twice: name one run"),
        (["--preset", "x" * 5000], "no preset 'xxx"),
        (["--distill.steps", "9" * 5000], "--distill.steps must be a whole number, not '999"),
        (["--distill.steps", "[" * 5000], "--distill.steps must be a whole number, not '[[["),
        (["--distill.steps", "1\nx = 2"], "--distill.steps: '1\\nx = 2' has a control character"),
        (["align"], "cannot read 'align': settings are written --table.key value"),
        (["--preset", "tiney"], "no preset 'tiney' (did you mean 'tiny'?)"),
    ],
)
def test_a_wrong_command_line_is_one_line(typed, words, line):
    with pytest.raises(UserError) as error:
        typed(*words)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
