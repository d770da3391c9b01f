"""A model's folder: which of its files belong to the model, and where they are fetched from.

Folders on the hub also hold the same weights in other forms (consolidated.safetensors, original/, pytorch_model.bin),
and code, which is never run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from pydantic import Field

from halo.errors import UserError, first_line
from halo.json_files import read_json
from halo.names import InnerPath
from halo.pointers import check_no_pointer

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

# Configurations, and all that tokenizers consist of: vocabularies, merges, added tokens, chat templates.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model")
_DEEPER = tuple(f"*/{pattern}" for pattern in _SMALL if pattern != "*.jinja")
"""Of other forms of the model. Only chat templates are in a subfolder, additional_chat_templates/."""


@dataclass(frozen=True, kw_only=True)
class _Index:
    """What model.safetensors.index.json says."""

    weight_map: Annotated[dict[str, InnerPath], Field(min_length=1)]
    """A weight's name -> the name of its file."""


def fetch_small_files(name: str) -> Path:
    """A model's local folder with all but its weights: `name` itself, or the hub's model of this name.

    Raises:
        UserError: it is neither, or something of it is a Git-LFS pointer.
    """
    folder = Path(name) if Path(name).is_dir() else _fetch(name, _SMALL, ignored=_DEEPER)
    for pattern in _SMALL:
        for file in sorted(folder.glob(pattern)):
            check_no_pointer(file)
    return folder


def check_no_code(folder: Path) -> None:
    """Refuse a folder with code that transformers runs from local folders, whatever `trust_remote_code` says.

    Raises:
        UserError: there is such code.
    """
    code = folder / "custom_generate" / "generate.py"
    if code.exists():
        raise UserError(f"{code} would be run when the model beside it is loaded: no code of a model is run; remove it")


def fetch_weights(name: str, folder: Path) -> None:
    """Complete what `fetch_small_files(name)` returned by the model's weights.

    Raises:
        UserError: there are no safetensors, or not all of them; one is a Git-LFS pointer.
    """
    files = weight_files(folder)
    if not Path(name).is_dir():
        # The small files are in a folder that has the name of their commit.
        _fetch(name, [file.name for file in files], revision=folder.name)
    for file in files:
        if not file.is_file():
            what = "a part of its weights" if (folder / WEIGHTS_INDEX).is_file() else ".safetensors weights"
            raise UserError(f"the teacher's folder {folder} lacks {what}: {file.name} is missing")
        check_no_pointer(file)


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, as transformers chooses them: model.safetensors, or those that its index names.

    They may be missing.

    Raises:
        UserError: the index is no table in JSON, or has no map of weights.
    """
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    names = set(read_json(index, _Index, "copy it again").weight_map.values())
    return [folder / name for name in sorted(names)]


def keys_of(file: Path) -> dict[str, Any]:
    """The table in a file of JSON.

    Raises:
        UserError: as `read_json`.
    """
    return read_json(file, dict[str, Any], "copy it again")


def _fetch(name: str, allowed: Sequence[str], *, ignored: Sequence[str] = (), revision: str | None = None) -> Path:
    try:
        return Path(
            snapshot_download(name, allow_patterns=list(allowed), ignore_patterns=list(ignored), revision=revision)
        )
    except HFValidationError as error:
        raise UserError(f"no teacher at '{name}': it is no folder, and no name that a model on the hub has") from error
    except Exception as error:  # of the hub's client, or of the HTTP client below it
        raise UserError(
            f"no teacher at '{name}': neither a folder nor a model on the hub that can be reached: {first_line(error)}"
        ) from error
