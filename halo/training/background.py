"""Writing a checkpoint's files beside training: a thread of each rank writes them to the disk, with checksums.

Hashing, writing and fsync release Python's lock, so training continues meanwhile. The thread makes no collective: that
a rank has written, the others learn in one that each step has anyway (halo/training/trainer.py).
"""

import copy
import hashlib
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from halo.names import FileRecord, Files


def on_host(value: Any) -> Any:
    """A deep copy with all tensors in host memory. Tensors that share memory (tied weights) share it in the copy too.

    Not in pinned memory: torch would round each tensor's size up to a power of two, and keep the memory until the end.
    """
    memo: dict[int, Any] = {}  # of deepcopy: the id of an object -> its copy
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    for tensor in _state_tensors(value):
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = copies[place]
    return copy.deepcopy(value, memo)


def _state_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _state_tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _state_tensors(part)


class Writing:
    """A thread that writes one rank's files of a checkpoint. It starts at once.

    A rank that ends with an error does not wait for it: its files are of no use then (halo/launch.py says how it ends).

    Args:
        folder: the checkpoint's folder. The folders of all files exist.
        contents: path -> content for torch.save, which nobody changes any more. Each is removed when it is written,
            which frees its memory.
    """

    def __init__(self, folder: Path, contents: dict[Path, Any]):
        self._folder, self._contents = folder, contents
        self._files: Files = {}
        self._seconds = 0.0
        self._failure: Exception | None = None
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def is_over(self) -> bool:
        """Whether all files are on the disk, or a failure has ended the writing."""
        return not self._thread.is_alive()

    def wait(self) -> tuple[Files, float]:
        """Wait until it is over.

        Returns:
            The files, named relative to the folder, and the seconds that writing them took.

        Raises:
            OSError: the file system could not write.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._files, self._seconds

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            while self._contents:
                path, content = self._contents.popitem()
                self._files[path.relative_to(self._folder).as_posix()] = write_tensors(content, path)
        except Exception as failure:  # `wait` raises it in the main thread, which can end the run
            self._failure = failure
        self._seconds = time.perf_counter() - began


def write_tensors(content: Any, path: Path) -> FileRecord:
    """torch.save to the disk. Returns the file's {"bytes", "sha256"}, hashed while it is written.

    Raises:
        OSError: the file system's own error (torch's error names a position in the zip file instead).
    """
    try:
        with _HashedFile(path) as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
            return {"bytes": file.tell(), "sha256": file.digest.hexdigest()}
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class _HashedFile(io.BufferedWriter):
    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)
