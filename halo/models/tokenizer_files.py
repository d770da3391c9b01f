"""The tokenizer in a folder: tokenizer.json, vocabulary and merges, or SentencePiece's tokenizer.model.

What decides the ids is in these files. Which class transformers makes of them is written beside them, and a class of
another kind (Llama's for a byte-level tokenizer.json) builds a tokenizer with other ids, without a word. So the ids of
a text are compared with those of the files. Code that is in the folder is never run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import transformers
from pydantic import ConfigDict, Field, with_config
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from typing_extensions import TypedDict

from halo.errors import UserError
from halo.json_files import read_json
from halo.models.folders import keys_of

FAST, SENTENCEPIECE, CLASS = "tokenizer.json", "tokenizer.model", "tokenizer_class"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NEEDED_FOR_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
"""Modules that transformers converts with, and their packages."""
_OF_4 = transformers.__version__.startswith("4.")
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""The class that adds nothing to tokenizer.json, as transformers 4 and 5 call it."""

_KINDS = ("word", "WORD", "20567", "'s", "'S", "é", "漢字", "🙂", "(", "...", "_")
_GAPS = ("", " ", "  ", "   ", "\n", "\n\n", "\r\n", " \n", "\n ", "\t")
_SAMPLES = (
    "It is a truth universally acknowledged, that 1 of 20,567 (or 3.14%) doesn't\n\n\tfit:  two spaces, x_y = f(z[0]);",
    "A naïve café, Ελληνικά, Русский, 漢字とかな, 한국어, العربية, 🙂 ﬁ ½ é\r\n",
    "the",
    "".join(map("".join, product(_KINDS, _GAPS, _KINDS))),
)
"""Texts of many kinds of characters and spaces: tokenizers differ in where they cut them."""


@dataclass(frozen=True)
class _Stored:
    """A tokenizer as its files have it, read without transformers."""

    vocabulary: set[str]
    ids: dict[str, list[int]]
    """Texts -> their ids, which must not change. SentencePiece's do where a text begins with a space: not here then."""


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder. Its ids are those of the files.

    Raises:
        UserError: there is none, its files are damaged, it needs code of its own or a package that is not installed, or
            the installed transformers makes another one of it.
    """
    settings = _settings(folder)
    stored = _stored(folder)
    failed, differs = None, False
    for made_by in _classes(folder, settings):
        try:
            tokenizer = _as_saved(folder, made_by, settings)
        except UserError as error:
            failed = failed or error
            continue
        if stored is None or _agree(tokenizer, stored, {*_strings(settings)}):
            return tokenizer
        differs = True
    if failed is not None and not differs:
        raise failed
    file = FAST if (folder / FAST).is_file() else SENTENCEPIECE
    raise UserError(
        f"transformers {transformers.__version__} makes a tokenizer with other ids of {folder / file}: take another "
        f"{FAST} of this model, or another version"
    )


def _classes(folder: Path, settings: dict[str, dict[str, Any]]) -> tuple[Any, ...]:
    """What may make the tokenizer of the files, the first that makes the right one."""
    if _only_sentencepiece(folder):
        # Of transformers 4, only the named classes read it. In the newest, they are others after they are saved.
        return (AutoTokenizer,) if _OF_4 else (PreTrainedTokenizerFast, AutoTokenizer)
    generic = settings.get(SETTINGS[0], {}).get(CLASS) in GENERIC
    return (PreTrainedTokenizerFast,) if generic else (AutoTokenizer, PreTrainedTokenizerFast)


@with_config(ConfigDict(extra="allow"))
class _TokenizerKeys(TypedDict, total=False):
    """The settings that transformers uses without looking at their type."""

    model_max_length: Annotated[float, Field(ge=1)] | None
    model_input_names: list[str]


def _only_sentencepiece(folder: Path) -> bool:
    return (folder / SENTENCEPIECE).is_file() and not (folder / FAST).is_file()


def _settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The tables beside the vocabulary by the names of their files, checked: all can be read, and the class exists."""
    kinds = {SETTINGS[0]: _TokenizerKeys}
    there = [name for name in SETTINGS if (folder / name).is_file()]
    found = {name: read_json(folder / name, kinds.get(name, dict[str, Any]), "copy it again") for name in there}
    first = found.get(SETTINGS[0], {})
    name = first.get(CLASS)
    if name is not None and not isinstance(name, str):
        raise UserError(f"{folder / SETTINGS[0]}: {CLASS} is {name!r}, not the name of a class")
    known = name in GENERIC or bool(name and any(map(tokenizer_class_from_name, (name, f"{name}Fast"))))
    if "auto_map" in first and not known:
        raise UserError(f"the tokenizer at {folder} ({name}) needs code of its own, which is never run")
    if name and not known:
        raise UserError(
            f"{folder / SETTINGS[0]}: transformers {transformers.__version__} has no {CLASS} {name}: install one that "
            f"has it, or, if {FAST} says all of this tokenizer, write {GENERIC[0]} there"
        )
    return found


def _stored(folder: Path) -> _Stored | None:
    """What the folder has of a tokenizer. None: a vocabulary and merges, which only transformers reads.

    Raises:
        UserError: it has none, or one that cannot be read.
    """
    if (file := folder / FAST).is_file():
        try:
            read = Tokenizer.from_file(str(file))
            read.no_truncation()
            read.no_padding()
            texts = (*_SAMPLES, *(f" {text}" for text in _SAMPLES))
            ids = {text: read.encode(text, add_special_tokens=False).ids for text in texts}
        except Exception as error:
            keys_of(file)  # raises if it is no JSON
            raise UserError(f"{file} cannot be read by the installed tokenizers: {_one_line(error)}") from error
        return _Stored(set(read.get_vocab()), ids)
    if _only_sentencepiece(folder):
        return _stored_sentencepiece(folder / SENTENCEPIECE)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        keys_of(folder / "vocab.json")
        return None
    others = [name for name in ("tekken.json", "vocab.txt", "vocab.json") if (folder / name).is_file()]
    instead = f" (a {others[0]} alone is not read)" if others else ""
    raise UserError(f"no tokenizer at {folder}: it has no {FAST}{instead}")


def _stored_sentencepiece(file: Path) -> _Stored:
    with file.open("rb") as opened:
        words = opened.readline(1000).split()
    if len(words) == 2 and words[1].isdigit():  # a token in base64, and its rank
        raise UserError(
            f"{file} is a vocabulary of tiktoken, which does not say how text is cut: take the {FAST} of this model"
        )
    if missing := [package for module, package in NEEDED_FOR_SENTENCEPIECE.items() if not _is_there(module)]:
        raise UserError(
            f"{file} needs packages that are not installed ({', '.join(missing)}): pip install "
            "'hypenet-halo[sentencepiece]'"
        )
    from sentencepiece import SentencePieceProcessor

    try:
        read = SentencePieceProcessor(model_file=str(file))
    except Exception as error:
        raise UserError(f"{file} is no whole model of SentencePiece: {_one_line(error)}") from error
    pieces = {read.id_to_piece(piece) for piece in range(read.get_piece_size())}
    return _Stored(pieces, {text: read.encode(text) for text in _SAMPLES})


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _as_saved(folder: Path, made_by: Any, settings: dict[str, dict[str, Any]]) -> PreTrainedTokenizerFast:
    first = settings.get(SETTINGS[0], {})
    arguments: dict[str, Any] = {"trust_remote_code": False}
    extra = first.get("extra_special_tokens")
    if _OF_4 and isinstance(extra, list):  # as transformers 5 writes them; transformers 4 has a list by another name
        tokens = [*(first.get("additional_special_tokens") or []), *extra]
        names = [token["content"] if isinstance(token, dict) else token for token in tokens]
        arguments |= {"extra_special_tokens": {}, "additional_special_tokens": list(dict.fromkeys(names))}
    if _only_sentencepiece(folder):
        arguments["add_bos_token"] = first.get("add_bos_token", True)  # as Llama's and Mistral's have it
    try:
        tokenizer = made_by.from_pretrained(folder, **arguments)
    except Exception as error:
        raise UserError(f"the tokenizer at {folder} cannot be loaded: {_one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        raise UserError(f"the tokenizer at {folder} ({kind}) has no {FAST}; save it as a fast tokenizer first")
    return tokenizer


def _agree(tokenizer: PreTrainedTokenizerFast, stored: _Stored, named: set[str]) -> bool:
    """Whether ids are those of the files, and no token is new that the files do not name: a class may add its own."""
    new = set(tokenizer.get_added_vocab()) - stored.vocabulary - named
    return not new and all(
        tokenizer(text, add_special_tokens=False)["input_ids"] == ids for text, ids in stored.ids.items()
    )


def _strings(value: Any) -> Iterator[str]:
    """All strings in tables and lists, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
