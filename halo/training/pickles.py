"""Loading checkpoints without running what they say: a pickle may call any function when it is loaded."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Environment variables that `torch.load` obeys whatever its caller passes."""


@contextmanager
def without_code(types: Sequence[type]) -> Iterator[None]:
    """Inside, `torch.load` makes tensors, plain values and `types` alone, also where its caller says otherwise."""
    before = {name: os.environ.pop(name) for name in (FORCE, FORBID) if name in os.environ}
    os.environ[FORCE] = "1"
    try:
        with safe_globals([*types]):
            yield
    finally:
        del os.environ[FORCE]
        os.environ |= before


def foreign_types(file: Path, types: Sequence[type]) -> list[str]:
    """The functions and classes that a file of `torch.save` names, beside tensors, plain values and `types`.

    Reads no tensors, and loads nothing.

    Raises:
        ValueError: it is no such file.
    """
    known = {f"{one.__module__}.{one.__qualname__}" for one in types}
    try:
        return sorted(set(get_unsafe_globals_in_checkpoint(file)) - known)
    except Exception as error:  # of a zip file, of a pickle in it, or of neither
        raise ValueError(f"torch.save did not write {file} ({type(error).__name__})") from error
