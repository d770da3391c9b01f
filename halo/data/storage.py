"""Files of shards in a folder or in object storage, and a cache of them on a node's own disk.

    s3://bucket/shards/distill   gs://...   azure://...   https://...   /shared/shards/distill

The downloaders of `streaming` fetch from object storage, with the credentials that its clients find. HTTP is plain.
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
from halo.run import atomic, sha256

TRIES = 3
TIMEOUT = 120.0
"""Seconds to wait for an answer."""
SLOWEST = 10_000
"""Bytes in a second, of a whole file: what comes slower is given up."""
PART = 1 << 20
"""Bytes that are read at a time."""
SMALL_FILE = 1 << 28
"""Bytes of a small file at most: a manifest of two million shards has fewer."""
HASH_BYTES = 64
"""The size of a file with the hash of another."""


def is_remote(source: str | Path) -> bool:
    return "://" in str(source)


def read_bytes(source: str | Path, name: str) -> bytes:
    """The content of a small file of a folder or URL.

    Raises:
        FileNotFoundError, NotADirectoryError: a folder has no such file.
        UserError: it cannot be downloaded, or is no small file.
    """
    if not is_remote(source):
        if (size := Path(source, name).stat().st_size) > SMALL_FILE:
            raise UserError(f"{source}/{name} has {size:,} bytes, more than the {SMALL_FILE:,} that are read")
        return Path(source, name).read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        fetch(source, name, Path(scratch, "file"), SMALL_FILE)
        return Path(scratch, "file").read_bytes()


def fetch(source: str | Path, name: str, path: Path, most: int) -> None:
    """Copy a file of a folder or URL to `path`, which must not exist.

    Args:
        most: the most bytes that it may have.

    Raises:
        UserError: the file cannot be fetched, after TRIES attempts: one that is cut off counts, too. Or it is larger.
    """
    url = f"{source}/{name}"
    for attempt in range(1, TRIES + 1):
        try:
            if not is_remote(source):
                shutil.copyfile(url, path)
            elif url.startswith(("http://", "https://")):
                _download(url, path, most)
            else:
                downloader = CloudDownloader.get(url)
                downloader.download(url, str(path), TIMEOUT)
                downloader.clean_up()
            if path.stat().st_size > most:
                raise UserError(f"{url} has more than the {most:,} bytes that it may have")
            return
        except UserError:
            path.unlink(missing_ok=True)
            raise
        except Exception as error:  # every client raises its own
            path.unlink(missing_ok=True)
            if attempt == TRIES:
                raise UserError(f"{url} cannot be fetched: {error}") from error
            time.sleep(attempt)


def _download(url: str, path: Path, most: int) -> None:
    """One attempt over HTTP.

    Raises:
        OSError: it was cut off, or takes too long; or as urlopen.
    """
    began, count = time.monotonic(), 0
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(path, "wb") as file:
        while part := answer.read1(PART):
            file.write(part)
            count += len(part)
            if count > most:
                return
            if time.monotonic() - began > TIMEOUT + count / SLOWEST:
                raise TimeoutError(f"slower than {SLOWEST:,} bytes a second")
        length = answer.headers["Content-Length"]
    if length is not None and count != int(length):
        raise ConnectionError(f"cut off after {count:,} of {length} bytes")


def cache_in(folder: str, gigabytes: float) -> "Cache | None":
    """The cache that a preset names: `shards_cache` and `shards_cache_gb`. None if `folder` is empty."""
    return Cache(folder=Path(folder), limit=int(gigabytes * 1e9)) if folder else None


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A folder on a node's own disk, shared by all processes of the node. It never holds more than `limit` bytes.

    Files are named after a hash of what they are made from. Beside each is the hash of its content, which is verified
    when a process opens it: a file that the disk has damaged is made anew. A killed process leaves only whole files, or
    a partial file that the next process overwrites.
    """

    folder: Path
    limit: int

    def get(self, name: str, size: int, write: Callable[[Path], None]) -> Path:
        """The path of a file; `write` makes it if it is missing. The least recently used files are removed for it.

        Args:
            size: the most bytes that the file needs, temporary files included.

        Raises:
            UserError: the cache cannot be written.
        """
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(self.folder / "lock"):
                if not _is_whole(path):
                    path.unlink(missing_ok=True)
                    self._make_room(size)
                    with atomic(path) as partial:
                        write(partial)
                        _hash_beside(path).write_text(sha256(partial))
                os.utime(path)
        except OSError as error:
            raise UserError(f"the cache of shards {self.folder} cannot be written: {error}") from error
        return path

    def _make_room(self, size: int) -> None:
        for partial in self.folder.glob("*.partial*"):  # of a killed process: this one holds the lock
            partial.unlink()
        paths = self.folder.glob("*.mds")
        files = sorted((path.stat().st_mtime_ns, path.stat().st_size + HASH_BYTES, path) for path in paths)
        used = sum(size for _, size, _ in files)
        for _, bytes_of, path in files:
            if used + size + HASH_BYTES <= self.limit:
                return
            path.unlink()  # a process that reads it now can still finish
            _hash_beside(path).unlink(missing_ok=True)
            used -= bytes_of


def _hash_beside(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    beside = _hash_beside(path)
    return path.is_file() and beside.is_file() and sha256(path) == beside.read_text()
