"""TOML tables and dataclasses: one into the other, with every key and type checked (by pydantic)."""

import difflib
import json
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from halo.bounds import IN_WORDS, shown
from halo.errors import UserError

T = TypeVar("T")

_UNKNOWN = "unexpected_keyword_argument"
_MUST_BE = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "dataclass_type": "a table",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "finite_number": "finite",
    "string_too_short": "text that is not empty",
    "string_too_long": "text of at most {max_length} characters",
}
"""pydantic's types of errors, in the words of TOML; in braces what it adds to one."""


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        UserError: the file is not TOML, or cannot be read.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits, or of nested lists
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
    lines = [f"{key} = {toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{prefix}{key}]", to_toml(value, f"{prefix}{key}.").strip()]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value that is no table, as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes are JSON's
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return repr(value)


def build(cls: type[T], table: dict[str, Any], where: str, typed: Collection[str] = ()) -> T:
    """A dataclass from a table, with every key and type checked. A number may be written as a whole number, and a
    tuple is a list; nothing else is converted.

    Args:
        where: the file that the table is from, with which an error's line begins.
        typed: the dotted keys that come from the command line instead.

    Raises:
        UserError: the first unknown key; else the first wrong value.
    """
    try:
        # As JSON, because pydantic's strict mode accepts a list for a tuple only there.
        return adapter(cls).validate_json(json.dumps(table, default=str), strict=True, extra="forbid")  # type: ignore[arg-type]
    except ValidationError as failed:
        errors = failed.errors(include_url=False)
        error = next((e for e in errors if e["type"] == _UNKNOWN), errors[0])
        key, problem = _in_words(cls, error)
        if any(f"{a}.".startswith(f"{b}.") for word in typed for a, b in ((word, key), (key, word))):
            raise UserError(f"--{key} {problem}") from failed
        raise UserError(f"{where}: {key} {problem}") from failed


def checked(kind: Any, value: Any) -> Any:
    """A single value, checked as in a table.

    Raises:
        ValueError: it is of another type, or out of bounds; in words.
    """
    try:
        return adapter(kind).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as failed:
        raise ValueError(_in_words(kind, failed.errors(include_url=False)[0])[1]) from failed


@cache
def adapter(cls: Any) -> TypeAdapter[Any]:
    """pydantic's view of a dataclass."""
    return TypeAdapter(cls)


def table_class(kind: Any) -> Any:
    """The dataclass that a type hint names, `Pretrain` for `Pretrain | None`; None where it names none."""
    return next((k for k in (kind, *get_args(kind)) if is_dataclass(k)), None)


def suggest(word: str, known: Sequence[str]) -> str:
    """The nearest of `known`, as the end of a sentence; empty where none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _in_words(cls: Any, error: ErrorDetails) -> tuple[str, str]:
    """The dotted key that an error is in, and what is wrong with it."""
    path, value, kind = error["loc"], error["input"], error["type"]
    key, at = ".".join(str(part) for part in path if not isinstance(part, int)), _kind_at(cls, path)
    match kind:
        case "value_error":  # from __post_init__: its message begins with the field's name
            name, _, problem = str(error["ctx"]["error"]).partition(" ")
            return f"{key}.{name}".lstrip("."), problem
        case "unexpected_keyword_argument":
            return key, f"is an unknown key{known_key(cls, path)}"
        case "missing" if not isinstance(path[-1], int):
            return key, "is missing"
        case "missing" | "too_long":
            return key, f"must be a list of {len(get_args(at))} values, not {shown(repr(value))}"
        case "literal_error":
            near = suggest(str(value), get_args(at))
            return key, f"must be one of {', '.join(get_args(at))}, not {shown(repr(value))}{near}"
        case "string_pattern_mismatch":
            return key, f"must be {IN_WORDS[error['ctx']['pattern']]}, not {shown(repr(value))}"
    if kind not in _MUST_BE:
        return key, f"is wrong: {error['msg']}"
    limits = {name: f"{limit:,}" if isinstance(limit, int) else limit for name, limit in error.get("ctx", {}).items()}
    return key, f"must be {_MUST_BE[kind].format(**limits)}, not {shown(repr(value))}"


def _kind_at(cls: Any, path: Sequence[str | int]) -> Any:
    """The type hint of a place in a table; a list's for its values; None where the classes have none."""
    kind = cls
    for part in path:
        if isinstance(part, str):
            owner = table_class(kind)
            kind = get_type_hints(owner).get(part) if owner else get_args(kind)[1]
    return kind


def known_key(cls: Any, path: Sequence[str | int]) -> str:
    """What may have been meant by an unknown key, as the end of a sentence."""
    *tables, word = (str(part) for part in path)
    near = suggest(word, list(get_type_hints(table_class(_kind_at(cls, tables)))))
    if near or not tables:
        return near
    hints = get_type_hints(cls)
    others = [name for name in hints if table_class(hints[name]) and word in get_type_hints(table_class(hints[name]))]
    return f" ({', '.join(others)} {'have' if len(others) > 1 else 'has'} it)" if others else ""
