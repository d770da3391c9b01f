"""The settings as options of a command line: `--table.key value`, the value written as in a preset.

    read_overrides(["--distill.lr", "5e-5"])   ->  {"distill": {"lr": 5e-5}}

The dataclasses of halo/config.py are the one definition: names, types, defaults, and the string under each field.
"""

import argparse
import ast
import inspect
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from halo import bounds
from halo.config import Config
from halo.errors import UserError
from halo.tables import checked, known_key, table_class, toml_value

MIXER_OPTIONS = "architecture.mixer_options"
"""The one setting that is a table with keys of its own, which belong to the mixers."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a wrong command line raises a UserError, and only an option's full name is accepted.

    No word may have a control character: most are paths, which errors name in their line.
    """

    def __init__(self, **more: Any):
        super().__init__(add_help=False, allow_abbrev=False, **more)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        for before, word in pairwise(["", *words]):
            if bounds.NO_TEXT.search(word):
                name = f"{before}: " if before.startswith("--") else ""
                raise UserError(f"{name}{word!a} has a control character, or is not UTF-8: type it without")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A key of a preset that is no table."""

    key: str
    """Its name with its tables: distill.corpus.needles."""
    kind: Any
    """The type hint."""
    default: Any
    """MISSING where a preset must have the key."""
    doc: str

    @property
    def table(self) -> str:
        """The first table, a stage's; empty for a key outside of all tables."""
        return self.key.partition(".")[0] if "." in self.key else ""

    def value_in(self, table: Any) -> Any:
        """A preset's value of it; MISSING where the preset has none."""
        for part in self.key.split("."):
            table = table.get(part, MISSING) if isinstance(table, dict) else MISSING
        return table

    def add_to(self, group: Any, value: Any = MISSING) -> None:
        """Add the setting to a parser or group, with help that gives type and default.

        Args:
            value: the default to show, in place of the dataclass's.
        """
        value = self.default if value is MISSING else value
        if value is MISSING:
            shown = "required"
        elif isinstance(value, dict):
            shown = f"default: {value or '{}'}"
        else:
            shown = f"default: {toml_value(value)}"
        described = f"{self.doc} (type: {type_name(self.kind)}, {shown})".replace("%", "%%")
        words = "true|false" if self.kind is bool else "|".join(choices(self.kind))
        words = words or type_name(self.kind).split()[0].upper()
        reader = str if self.kind is str or choices(self.kind) else read_value
        group.add_argument(
            f"--{self.key}", dest=self.key, metavar=words, type=reader, default=argparse.SUPPRESS, help=described
        )


@cache
def settings(cls: Any = Config, prefix: str = "") -> tuple[Setting, ...]:
    """Every setting of a dataclass and of its tables, in their order."""
    found: list[Setting] = []
    hints, docs = get_type_hints(cls), attribute_docs(cls)
    for f in fields(cls):
        kind, key = hints[f.name], f"{prefix}{f.name}"
        table = table_class(kind)
        if table:
            found += settings(table, f"{key}.")
        else:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            found.append(Setting(key=key, kind=kind, default=default, doc=docs[f.name]))
    return tuple(found)


def read_overrides(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings on a command line, as a preset's table, and their dotted keys.

    Args:
        words: options and their values, `--table.key value` or `--table.key=value`. A key may have hyphens for
            underscores.

    Raises:
        UserError: a word that is no option of a setting, with the nearest; or an option without a value.
    """
    words = [with_underscores(word) for word in words]
    parser = OneLineParser()
    typed = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    for setting in settings():
        if setting.key in typed:
            setting.add_to(parser)
    for key in typed:
        if key.startswith(f"{MIXER_OPTIONS}."):
            parser.add_argument(f"--{key}", type=read_value, default=argparse.SUPPRESS, dest=key)
    given, rest = parser.parse_known_args(words)
    if rest:
        raise UserError(_not_understood(rest[0]))
    table: dict[str, Any] = {}
    for key, value in vars(given).items():
        *tables, last = key.split(".")
        inner = table
        for name in tables:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise UserError(f"--{key}: '{name}' is a value, not a table")
        inner[last] = value
    return table, list(vars(given))


def read_value(text: str) -> Any:
    """A value as TOML writes it. Other text stays a string, and is refused later where the setting is no string."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text  # a line more would be another key


def within(kind: Any) -> Callable[[str], Any]:
    """A reader of options that are no settings, with the bounds of a type (halo/bounds.py)."""

    def read(text: str) -> Any:
        try:
            return checked(kind, read_value(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def attribute_docs(cls: Any) -> dict[str, str]:
    """The string under each field of a class and its bases, on one line."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        docs |= _docs_in(inspect.getmodule(base)).get(base.__name__, {})
    return docs


@cache
def _docs_in(module: ModuleType) -> dict[str, dict[str, str]]:
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            of_class = docs.setdefault(node.name, {})
            for field, text in pairwise(node.body):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                        of_class[name] = " ".join(doc.split())
    return docs


def type_name(kind: Any) -> str:
    """A type hint in words: float, "list of int"."""
    if choices(kind):
        return f"one of {', '.join(choices(kind))}"
    if get_origin(kind) is tuple:
        return f"list of {type_name(get_args(kind)[0])}"
    return "table" if get_origin(kind) is dict else kind.__name__


def choices(kind: Any) -> tuple[str, ...]:
    """The values of a Literal; none for another type."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def with_underscores(word: str) -> str:
    """`--distill.micro-batch=6` -> `--distill.micro_batch=6`. The name of a mixer keeps its hyphens."""
    if not word.startswith("--"):
        return word
    key, equals, value = word[2:].partition("=")
    parts = key.split(".")
    before = ["", *parts]
    keys = [
        part if last == "mixer_options" else part.replace("-", "_") for last, part in zip(before, parts, strict=False)
    ]
    return f"--{'.'.join(keys)}{equals}{value}"


def _not_understood(word: str) -> str:
    """What is wrong with a word that is no option of a setting."""
    if not word.startswith("--"):
        return f"cannot read '{word}': settings are written --table.key value"
    key, known = word[2:].partition("=")[0], [setting.key for setting in settings()]
    parts: list[str] = []
    for part in key.split("."):
        if ".".join(parts) in known:
            return f"--{key}: '{'.'.join(parts)}' is a value, not a table"
        parts.append(part)
        if not any(f"{name}.".startswith(f"{'.'.join(parts)}.") for name in known):
            return f"--{'.'.join(parts)} is an unknown key{known_key(Config, parts)}"
    return f"--{key} is a table: write --{key}.key value"
