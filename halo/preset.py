"""A preset: a TOML file with a table for each stage, which becomes a Config.

    config = load_config("tiny", overrides=["--distill.lr", "5e-5"])

A preset gives only what differs from the defaults of halo/config.py, or from the shipped preset that is its `base`.
Unknown keys are refused with a suggestion. In a preset, a path that starts with "./" or "../" is relative to the
preset's file.
"""

import os
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from halo.config import Config
from halo.errors import UserError
from halo.options import MIXER_OPTIONS, read_overrides, settings
from halo.tables import build, read_toml, suggest, toml_value

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "tiny"
"""The embedded one, which needs no download."""


def load_config(preset: str | Path, overrides: Sequence[str] = (), recorded: Path | None = None) -> Config:
    """Read a preset, apply `--table.key value` overrides, check every key, type and value.

    Args:
        preset: the name of a shipped preset, or the path of a TOML file.
        overrides: alternating `--table.key` (or `--key`) and value, as left over by a command line.
        recorded: a run's config.toml. Where it exists, it stands in for the preset: a run remembers its settings.

    Raises:
        UserError: an unknown preset or key (with the nearest that exists), or a wrong value.
    """
    path, table = preset_table(preset, recorded)
    given, keys = read_overrides(overrides)
    if MIXER_OPTIONS in keys:  # typed as a whole: none of the old ones stays
        table.get("architecture", {}).pop("mixer_options", None)
    return build(Config, _merged(table, given), where=str(path), typed=keys)


def preset_table(preset: str | Path, recorded: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """The file with the settings of a preset, or of a run (see `load_config`), and its table, not checked yet.

    Raises:
        UserError: an unknown preset or base, or a file that is not TOML.
    """
    path = Path(preset)
    if path.suffix != ".toml":
        path = PRESETS / f"{preset}.toml"
    if not os.path.isfile(path):  # unlike Path.is_file, also where the name is too long for a file
        names = sorted(p.stem for p in PRESETS.glob("*.toml"))
        raise UserError(f"no preset '{preset}'{suggest(str(preset), names)}; presets: {', '.join(names)}")
    table = {"name": path.stem} | _read_preset(path)
    if recorded is not None and os.path.isfile(recorded):
        return recorded, read_toml(recorded) | {"name": table["name"]}
    return path, table


def remembered(preset: str | Path, overrides: Sequence[str], recorded: Path) -> str:
    """The settings that a command has from a run's config.toml and neither from the preset nor from what is typed.

    In one line; empty where there are none. Earlier commands wrote them, one that was killed at once too.
    """
    if not os.path.isfile(recorded):
        return ""
    _, table = preset_table(preset)
    of_run, (_, typed) = read_toml(recorded), read_overrides(overrides)
    found = []
    for setting in settings():
        of_preset, value = setting.value_in(table), setting.value_in(of_run)
        of_preset = setting.default if of_preset is MISSING else of_preset
        of_preset = list(of_preset) if isinstance(of_preset, tuple) else of_preset
        if value not in (MISSING, of_preset) and not any(f"{key}.".startswith(f"{setting.key}.") for key in typed):
            found.append(f"{setting.key} = {value if isinstance(value, dict) else toml_value(value)}")
    return f"{recorded}, from earlier commands, changes the preset: {', '.join(found)}" if found else ""


def default_run(preset: str | Path, overrides: Sequence[str] = ()) -> Path:
    """The folder of a run that the command line does not name: runs/<name>.

    Raises:
        UserError: see `preset_table`; or an override that cannot be read.
    """
    _, table = preset_table(preset)
    given, _ = read_overrides(overrides)
    return Path("runs") / str(_merged(table, given)["name"])  # no string is refused with all other settings


def _read_preset(path: Path) -> dict[str, Any]:
    """A preset, on top of the shipped one that it names as its `base`, if any."""
    table = _anchor(read_toml(path), path.parent)
    base = table.pop("base", None)
    if base is None:
        return table
    if not (PRESETS / f"{base}.toml").is_file():
        names = [shipped.stem for shipped in PRESETS.glob("*.toml")]
        raise UserError(f"{path} names a base that is no shipped preset: '{base}'{suggest(str(base), names)}")
    return _merged(_read_preset(PRESETS / f"{base}.toml"), table)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two tables as one. Where both have a value, it is that of `above`."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _anchor(value: Any, folder: Path) -> Any:
    """Make "./x" and "../x" absolute, from the preset's folder."""
    if isinstance(value, dict):
        return {k: _anchor(v, folder) for k, v in value.items()}
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str((folder / value).resolve())
    return value
