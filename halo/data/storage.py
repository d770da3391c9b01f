"""Files of shards wherever they are: in a folder, or in object storage; and a cache of them on a node's own disk.

    s3://bucket/shards/distill   gs://...   azure://...   https://...   /shared/shards/distill

streaming's downloaders fetch from object storage, with the credentials that their clients find; HTTP is plain.
"""

import os
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streaming.base.storage import CloudDownloader

from halo.data.locks import exclusive
from halo.errors import UserError
from halo.run import atomic

TRIES = 3
TIMEOUT = 120.0
"""Seconds without an answer."""


def is_remote(source: str | Path) -> bool:
    return "://" in str(source)


def read_bytes(source: str | Path, name: str) -> bytes:
    """A small file of a folder or URL.

    Raises:
        FileNotFoundError, NotADirectoryError: a folder has no such file.
        UserError: it cannot be downloaded.
    """
    if not is_remote(source):
        return Path(source, name).read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        fetch(source, name, Path(scratch, "file"))
        return Path(scratch, "file").read_bytes()


def fetch(source: str | Path, name: str, path: Path) -> None:
    """Copy a file of a folder or URL to `path`, which does not exist.

    Raises:
        UserError: it cannot be had, after some tries.
        OSError: `path` cannot be written.
    """
    url = f"{source}/{name}"
    for attempt in range(1, TRIES + 1):
        try:
            if not is_remote(source):
                shutil.copyfile(url, path)
            elif url.startswith(("http://", "https://")):
                with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(path, "wb") as file:
                    shutil.copyfileobj(answer, file)
            else:
                downloader = CloudDownloader.get(url)
                downloader.download(url, str(path), TIMEOUT)
                downloader.clean_up()
            return
        except Exception as error:  # every client raises its own
            path.unlink(missing_ok=True)
            if attempt == TRIES:
                raise UserError(f"{url} cannot be fetched: {error}") from error
            time.sleep(attempt)


def cache_in(folder: str, gigabytes: float) -> "Cache | None":
    """A cache, as a preset names it; "" is none."""
    return Cache(folder=Path(folder), limit=int(gigabytes * 1e9)) if folder else None


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A folder on a node's own disk that the node's processes share. It never holds more than `limit` bytes.

    Files are named after their content. A process that is killed leaves whole files, or one that the next overwrites.
    """

    folder: Path
    limit: int

    def get(self, name: str, size: int, write: Callable[[Path], None]) -> Path:
        """The path of a file, which `write` makes if it is not there. What was used longest ago makes room.

        Args:
            size: bytes that it takes, at most, and while it is made.

        Raises:
            UserError: the cache cannot be written.
        """
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(self.folder / "lock"):
                if not path.is_file():
                    self._make_room(size)
                    with atomic(path) as partial:
                        write(partial)
                os.utime(path)
        except OSError as error:
            raise UserError(f"the cache of shards {self.folder} cannot be written: {error}") from error
        return path

    def _make_room(self, size: int) -> None:
        for partial in self.folder.glob("*.partial*"):  # of a process that was killed: nobody else is here
            partial.unlink()
        files = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.folder.glob("*.mds"))
        used = sum(size for _, size, _ in files)
        for _, bytes_of, path in files:
            if used + size <= self.limit:
                return
            path.unlink()  # whoever reads it now keeps it until done
            used -= bytes_of
