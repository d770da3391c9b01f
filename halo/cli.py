"""The command line of every launcher: its options, the settings, `--help` and `--version`.

    main("distill", description=__doc__)     # a launcher of a stage
    main(None, description=__doc__)          # of all stages of a conversion

Imports nothing heavy: `--help` and a misspelt key are answered before torch, transformers and DeepSpeed are imported.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

from halo import __version__
from halo.config import Config
from halo.errors import EXIT_USER_ERROR, UserError, exit_on_user_error, in_one_line
from halo.graph import RUN_CONFIG, STAGES, conversion, stages_to
from halo.job import Job
from halo.options import OneLineParser, settings, with_underscores
from halo.preset import DEFAULT_PRESET, default_run, load_config, preset_table, remembered
from halo.tables import suggest, table_class

DS_CONFIG = Path(__file__).parent.parent / "ds_configs" / "zero1.json"
GENERAL = ("", "architecture")
"""The settings outside of the stages' tables: keys without a table, and the architecture's."""
VERSIONS = ("torch", "deepspeed", "transformers")
"""The packages whose versions `--version` gives beside this one's."""


def main(
    stage: str | None,
    *,
    description: str,
    tables: Sequence[str] | None = None,
    work: Callable[[Job], object] | None = None,
) -> None:
    """The whole work of a launcher: read the command line, run the stages on all ranks, end them together.

    A single process reports a mistake at once.

    Args:
        stage: the stage that it runs. None: all stages of a conversion, or those up to `--until`.
        tables: the tables whose settings `--help` lists. None: those of its stages, and the general ones.
        work: what it does, on all ranks. None: it runs the stages.
    """
    with exit_on_user_error():
        _check_rank_variables()
    parser = _job_parser(description, stage)
    shown = (*GENERAL, *([stage] if stage else _conversion())) if tables is None else tables
    job: Job | UserError
    try:
        with in_one_line():
            job = _read_job(parser, shown, stage)
    except UserError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)
        job = error
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # where nothing is to be saved, Ctrl-C ends it without a traceback
    from halo.launch import run_job  # only now: it imports torch, and takes seconds

    run_job(work or _run, job)


def _conversion() -> list[str]:
    return [stage.name for stage in conversion()]


def new_parser(description: str) -> OneLineParser:
    """A launcher's parser, with the options that all have. Add others, then call `read`."""
    parser = OneLineParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [option ...] [--table.key value ...]",
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help and exit")
    parser.add_argument("--version", action="store_true", help="show versions and exit")
    return parser


def read(parser: OneLineParser, *, shown: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read a command line; returns its options, and the words of settings (see `load_config`), not checked yet.

    `--help` and `--version` are answered by rank 0, and end the process.

    Args:
        parser: from `new_parser`. If it has `--preset`, `--help` shows the preset's values, and with `--run` the run's.
        shown: the tables whose settings `--help` lists; "" stands for the keys outside of tables.

    Raises:
        UserError: an option that does not exist, with the nearest, or without its value, or with an empty one.
    """
    words = [with_underscores(word) for word in sys.argv[1:]]
    answered = {"-h", "--help", "--version"} & set(words)
    if answered:
        if os.environ.get("RANK", "0") == "0":
            print(version_line() if answered == {"--version"} else _help(parser, shown, words), end="")
        sys.exit(0)
    arguments, rest = parser.parse_known_args(words)
    for option, value in vars(arguments).items():
        if value == "":
            raise UserError(f"--{option} is empty: is the shell's variable set? Give it a value, or leave it out")
    options = [option[2:] for action in parser._actions for option in action.option_strings if option.startswith("--")]
    keys = {setting.key.partition(".")[0] for setting in settings()}
    for word in rest:
        key = word[2:].partition("=")[0]
        if word.startswith("--") and "." not in key and key not in keys:
            raise UserError(f"no option --{key}{suggest(key, [*options, *keys])}: --help lists them")
    return arguments, rest


def version_line() -> str:
    """This package's version, and those that a bug report needs."""
    others = ", ".join(f"{package} {version(package)}" for package in VERSIONS)
    return f"hypenet-halo {__version__} ({others})\n"


def _job_parser(description: str, stage: str | None) -> OneLineParser:
    """The options of a launcher of this stage, or of all of a conversion, beside the settings."""
    parser = new_parser(description)
    parser.add_argument(
        "--preset",
        metavar="PRESET",
        help=f"a shipped preset or the path of a TOML file (default: {DEFAULT_PRESET}, the embedded one)",
    )
    parser.add_argument("--run", metavar="FOLDER", help="the run's folder (default: runs/<preset>)")
    parser.add_argument(
        "--ds_config", metavar="FILE", default=str(DS_CONFIG), help="DeepSpeed JSON (default: ds_configs/zero1.json)"
    )
    if stage is None:
        parser.add_argument("--until", metavar="STAGE", help="the last stage to run (default: all stages)")
        parser.add_argument(
            "--text", metavar="PATH", help="sets heldout, and corpus.source of all stages, to this folder or file"
        )
    else:
        parser.add_argument(
            "--prepare",
            action="store_true",
            help="first run the earlier stages that are missing (always so without --preset)",
        )
    if stage is None or STAGES[stage].conversion:
        parser.add_argument(
            "--from",
            dest="taken",
            nargs="+",
            action="append",
            default=[],
            metavar=("RUN", "STAGE"),
            help="take finished stages from another run's folder",
        )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


def _read_job(parser: OneLineParser, shown: Sequence[str], stage: str | None) -> Job:
    """Raises:
    UserError: what is wrong with the command line, the preset or the run's recorded settings.
    """
    arguments, overrides = read(parser, shown=shown)
    preset = arguments.preset or DEFAULT_PRESET
    if stage is None:
        stages = _stages_until(arguments.until)
        overrides = [*_text_settings(arguments.text), *overrides]
    else:
        stages = stages_to(stage, arguments.prepare or arguments.preset is None)
    run = Path(arguments.run) if arguments.run else default_run(preset, overrides)
    taken_from, taken_stages = _taken(getattr(arguments, "taken", []))
    return Job(
        config=load_config(preset, overrides, recorded=run / RUN_CONFIG),
        remembered=remembered(preset, overrides, run / RUN_CONFIG),
        run=run,
        ds_config=Path(arguments.ds_config),
        stages=tuple(stages),
        taken_from=taken_from,
        taken_stages=taken_stages,
    )


def _stages_until(last: str | None) -> list[str]:
    """All stages of a conversion; if `last` is given, itself and those that it needs."""
    if last is None:
        return _conversion()
    if last not in _conversion():
        raise UserError(f"--until: no stage '{last}'{suggest(last, _conversion())}; stages: {', '.join(_conversion())}")
    return stages_to(last, prepare=True)


def _text_settings(text: str | None) -> list[str]:
    """The settings that `--text` stands for, as words of a command line."""
    if text is None:
        return []
    sources = [f"{stage.name}.corpus.source" for stage in conversion() if stage.trains]
    return [word for key in ("heldout", *sources) for word in (f"--{key}", text)]


def _taken(given: Sequence[Sequence[str]]) -> tuple[Path | None, tuple[str, ...]]:
    """What `--from` names; `given` are the words of each."""
    if not given:
        return None, ()
    if len(given) > 1:
        raise UserError("--from is given twice: name one run, and all stages of it after one --from")
    run, *stages = given[0]
    known = _conversion()
    if not run:
        raise UserError("--from '' names no run: write --from RUN STAGE ...")
    if not stages:
        raise UserError(f"--from {run} names no stage: write --from {run} STAGE ..., of {', '.join(known)}")
    for stage in stages:
        if stage not in known:
            raise UserError(f"--from: no stage '{stage}'{suggest(stage, known)}; stages: {', '.join(known)}")
    return Path(run), tuple(dict.fromkeys(stages))


def _check_rank_variables() -> None:
    """Raises:
    UserError: the environment makes this process a rank, but lacks a variable, or has one that is no number.
    """
    if "RANK" not in os.environ:
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        value = os.environ.get(name)
        if value is None:
            raise UserError(f"RANK is set in the environment, but {name} is not: unset RANK, or start all ranks")
        if name != "MASTER_ADDR" and not (value.isascii() and value.isdigit()):
            raise UserError(f"{name} = {value!r} in the environment: it must be a whole number")
    if not int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]):
        raise UserError(f"RANK = {os.environ['RANK']} of WORLD_SIZE = {os.environ['WORLD_SIZE']}: ranks count from 0")


def _run(job: Job) -> None:
    from halo.pipeline import run_stages  # not before the command line is read

    run_stages(job)


def _help(parser: OneLineParser, shown: Sequence[str], words: Sequence[str]) -> str:
    """The help of a launcher: its own options, then the settings, a group for each table."""
    named = OneLineParser()
    for option in ("--preset", "--run"):
        named.add_argument(option, nargs="?")
    chosen, _ = named.parse_known_args(words)
    default = next((action.default for action in parser._actions if action.dest == "preset"), None)
    preset = chosen.preset or default or DEFAULT_PRESET
    path, table = preset_table(preset, Path(chosen.run) / "config.toml" if chosen.run else None)
    groups: dict[str, Any] = {}
    for setting in settings():
        if setting.table in shown:
            if setting.table not in groups:
                groups[setting.table] = parser.add_argument_group(*_group_title(setting.table))
            setting.add_to(groups[setting.table], setting.value_in(table))
    source = f"of the run ({path})" if path.name == "config.toml" else f"of preset {preset}"
    parser.epilog = f"The defaults are those {source}. Settings of other stages are accepted too, and recorded."
    return parser.format_help()


def _group_title(table: str) -> tuple[str, str | None]:
    """Title and description of a table's group."""
    if not table:
        return "settings of the whole conversion", None
    kind = table_class(get_type_hints(Config)[table])
    return f"settings of [{table}]", " ".join(kind.__doc__.split())
