"""TOML tables and dataclasses: one into the other, with every key and type checked."""

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from halo.errors import UserError

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """Raises:
    UserError: the file is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error


def config_table(config: Any) -> dict[str, Any]:
    """The configuration as TOML has it (tables, lists, no key that is None): what a run records."""
    table: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            table[f.name] = config_table(value)
        elif value is not None:
            table[f.name] = list(value) if isinstance(value, tuple) else value
    return table


def to_toml(table: dict[str, Any], prefix: str = "") -> str:
    """Plain tables as TOML text; the inverse of tomllib for what a Config holds."""
    lines = [f"{key} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{prefix}{key}]", to_toml(value, f"{prefix}{key}.").strip()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)


def build(cls: type[T], table: dict[str, Any], where: str) -> T:
    """A dataclass from a table, every key and type checked.

    Raises:
        UserError: what is wrong, beginning with `where`.
    """
    hints = get_type_hints(cls)
    for key in table:
        if key not in hints:
            raise UserError(f"{where}: unknown key '{key}'{suggest(key, list(hints))}")
    missing = [
        f.name
        for f in fields(cls)  # type: ignore[arg-type]
        if f.name not in table and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise UserError(f"{where}: missing key '{missing[0]}'")
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in table.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        kind = next(k for k in get_args(kind) if k is not type(None))
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a table, not {value!r}")
        return build(kind, value, where)  # type: ignore[arg-type]
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a table, not {value!r}")
        return {key: _convert(get_args(kind)[1], v, f"{where}.{key}") for key, v in value.items()}
    if kind is Any:
        return value
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            near = suggest(str(value), get_args(kind))
            raise UserError(f"{where} must be one of {', '.join(get_args(kind))}, not {value!r}{near}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, not {value!r}")
        return tuple(_convert(get_args(kind)[0], v, where) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{where} must be {_article(kind.__name__)}, not {value!r}")
    return value


def _article(kind: str) -> str:
    return {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false"}[kind]


def suggest(word: str, known: Sequence[str]) -> str:
    """The nearest of `known`, as the end of a sentence; empty where none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
