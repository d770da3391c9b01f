"""A checkpoint's files are written beside training: a thread of each rank brings them to the disk, with checksums.

Hashing, writing and fsync release Python's lock, so training goes on meanwhile. The thread takes part in no
collective; the ranks tell each other in one that each step has anyway that they are done (halo/training/trainer.py).
"""

import hashlib
import io
import os
import time
from pathlib import Path
from threading import Thread
from typing import Any

import torch

Files = dict[str, dict[str, Any]]
"""File name -> {"bytes", "sha256"}."""


class Writing:
    """One rank's files of a checkpoint, which a thread writes from now on.

    A rank that ends with an error does not wait for the thread: what it writes is of no use then.

    Args:
        folder: what the names in the list of files are relative to. The files' folders exist.
        contents: path -> what torch.save takes, which nobody else changes any more. Emptied on the way, which frees
            the memory.
    """

    def __init__(self, folder: Path, contents: dict[Path, Any]):
        self._folder, self._contents = folder, contents
        self._files: Files = {}
        self._seconds = 0.0
        self._failure: Exception | None = None
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def is_over(self) -> bool:
        """Whether all is on the disk, or a failure has ended it."""
        return not self._thread.is_alive()

    def wait(self) -> tuple[Files, float]:
        """Returns:
            What was written, and the seconds that it took.

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
        except Exception as failure:  # `wait` raises it, in the thread that can end the run
            self._failure = failure
        self._seconds = time.perf_counter() - began


def write_tensors(content: Any, path: Path) -> dict[str, Any]:
    """torch.save to the disk. Returns the file's {"bytes", "sha256"}, taken while writing: it is not read again.

    Raises:
        OSError: the file system's own error (torch's would name a place in the zip).
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
