"""Whatever is typed for a setting, it is taken or refused in one short line, at once. All in one process."""

import sys

import pytest

from halo import cli
from halo.errors import EXIT_USER_ERROR, UserError
from halo.options import settings, type_name
from halo.preset import load_config, preset_table, remembered
from halo.stages.scaling import lacking
from halo.tables import config_table, to_toml

KEYS = [setting.key for setting in settings()] + ["architecture.mixer_options.gla.use_rope"]
NO_NUMBERS = ["", "x", "true", "nan", "1e400", "1" * 5000, "[[1]]", "{a = 1}", "[" * 3000]
HUGE = f"1{'0' * 30}"
NUMBERS = ["-1", "1.5", HUGE, "[]", "[nan]", f"[{'1,' * 1000}]"]
NO_TEXT = ["a\nb", "\udcff"]
LONGEST = 300
"""Characters of a line."""


def refusal(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """The line with which a launcher refuses these words; empty if it takes them."""
    monkeypatch.setattr(sys, "argv", ["kd.py", "--preset", "tiny", *words])
    try:
        cli._read_job(cli._job_parser("", "distill"), cli.GENERAL, "distill")
    except UserError as error:
        return str(error)
    return ""


def refused_value(key: str, value: str) -> str:
    try:
        load_config("tiny", [f"--{key}", value])
    except UserError as error:
        return str(error)
    return ""


def test_every_setting_takes_or_refuses_every_value(monkeypatch):
    path, table = preset_table("tiny")
    monkeypatch.setattr("halo.preset.preset_table", lambda *_: (path, table))  # to read the file once
    taken = set()
    for key in KEYS:
        for value in [*NO_NUMBERS, *NUMBERS, *NO_TEXT]:
            line = refused_value(key, value)
            assert len(line.splitlines()) <= 1 and len(line) < LONGEST, (key, value[:20], line)
            if not line:
                taken.add((key, value))
            elif f"{key} must be" in line or value in NO_TEXT:
                assert line.startswith(f"--{key}"), (key, value[:20], line)
    of_numbers = [setting.key for setting in settings() if type_name(setting.kind) in ("int", "float")]
    assert not taken & {(key, value) for key in of_numbers for value in [*NO_NUMBERS, HUGE]}
    assert not taken & {(key, value) for key in KEYS for value in NO_TEXT}
    assert {key for key in of_numbers if (key, "-1") in taken} == {"distill.kept_layers", "finetune.kept_layers"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--align.batch", "10" * 6], "--align.batch must be at most 1,000,000, not 101010101010"),
        (["--finetune.seq_len", "1000000000"], "--finetune.seq_len must be at most 4,194,304, not 1000000000"),
        (["--selection.questions", "1000000000"], "--selection.questions must be at most 1,000,000, not 1000000000"),
        (["--align.betas", "[0.9, 0.99999999]"], "--align.betas must be at most 0.999999, not 0.99999999"),
        (["--align.seed", "4294967296"], "--align.seed must be less than 4,294,967,296, not 4294967296"),
        (
            ["--scaling.candidates", "[100, 100.00001]"],
            "--scaling.candidates must be of 6 different digits, not [100.0",
        ),
        (["--scaling.candidates", "[1.0000001]"], "--scaling.candidates must be at least 1.01, not 1.0000001"),
        (["--distill.shards_cache_gb", "inf"], "--distill.shards_cache_gb must be finite, not inf"),
        (["--name", "../../x"], "--name must be the name of a folder, of letters, digits, blanks and ._+=@-, not '../"),
        (["--name", ".."], "--name must be the name of a folder"),
        (["--teacher", "a\nb"], "--teacher: 'a\\nb' has a control character, or is not UTF-8: type it without"),
        (["--run", "\udcff"], "--run: '\\udcff' has a control character, or is not UTF-8: type it without"),
    ],
)
def test_what_a_setting_may_be(monkeypatch, tmp_path, words, line):
    monkeypatch.chdir(tmp_path)
    assert refusal(monkeypatch, *words).startswith(line)


def test_a_preset_cannot_name_a_run_elsewhere(monkeypatch, tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text('base = "tiny"\nname = "../../x"\n')
    monkeypatch.setattr(sys, "argv", ["kd.py", "--preset", str(preset)])
    with pytest.raises(UserError, match=r"mine.toml: name must be the name of a folder"):
        cli._read_job(cli._job_parser("", "distill"), cli.GENERAL, "distill")


def test_settings_that_an_earlier_command_left_are_said(tmp_path):
    """That command may have been killed at once, and this one may be meant without its settings."""
    recorded = tmp_path / "config.toml"
    assert remembered("tiny", [], recorded) == ""
    recorded.write_text(to_toml(config_table(load_config("tiny"))))
    assert remembered("tiny", [], recorded) == ""
    before = ["--align.lr", "0.5", "--niah.seed=3", "--scaling.candidates", "[50, 60]"]
    before += ["--rnn_mixer", "gla", "--architecture.mixer_options.gla.use_rope", "false"]
    recorded.write_text(to_toml(config_table(load_config("tiny", before))))
    assert remembered("tiny", ["--niah.seed", "4", "--rnn_mixer", "gla"], recorded) == (
        f"{recorded}, from earlier commands, changes the preset: "
        "architecture.mixer_options = {'gla': {'use_rope': False}}, align.lr = 0.5, scaling.candidates = [50.0, 60.0]"
    )
    assert "mixer_options" not in remembered("tiny", ["--architecture.mixer_options.gla.use_rope", "true"], recorded)


def test_windows_that_are_not_there_are_said():
    settings = load_config("tiny", ["--scaling.documents", "16"]).scaling
    assert lacking(16, 512, settings) == ""
    assert lacking(1, 8192, settings) == "`heldout` has 1 windows of 8,192 tokens, not 16: measured on these"


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "RANK is set in the environment, but WORLD_SIZE is not: unset RANK, or start all ranks"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' in the environment: it must be a whole number"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, "RANK is set in the environment, but MASTER_ADDR"),
        (
            {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "1", "MASTER_ADDR": "x"},
            "RANK = 1 of WORLD_SIZE = 1: ranks count from 0",
        ),
    ],
)
def test_a_rank_without_all_of_its_variables(monkeypatch, capsys, environment, line):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        cli.main("distill", description="")
    assert ended.value.code == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith(f"error: {line}")
