"""Shards over HTTP, compressed, in a cache of bounded size: the same samples, and damage is found."""

import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from halo.data import storage, stream
from halo.data.locks import exclusive
from halo.data.reader import ShardReader
from halo.data.shards import verify_shards, write_samples
from halo.data.storage import Cache
from halo.data.stream import TokenStream
from halo.errors import UserError
from halo.run import sha256

SAMPLES, T, SHARDS = 400, 64, 20
LIMIT = 40_000
"""Bytes of the cache: eleven of the shards."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three or four shards."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(storage, "TRIES", 1)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return _write(tmp_path / "shards")


def _write(folder: Path, compression: str = "") -> Path:
    """Twenty shards of twenty samples; sample n consists of tokens n."""
    samples = np.repeat(np.arange(SAMPLES, dtype=np.uint16)[:, None], T, axis=1)
    shards = []
    for i, some in enumerate(np.split(samples, SHARDS)):
        shards += write_samples(folder, f"{i:06}", some, compression)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    files = [shard["zip_data"] or shard["raw_data"] for shard in shards]
    digests = {file["basename"]: file["hashes"]["sha256"] for file in files}
    digests["index.json"] = sha256(folder / "index.json")
    manifest = {"tokenizer": "mine", "samples": SAMPLES, "seq_len": T, "dtype": "uint16", "sha256": digests}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; sends what a test puts into `first`, and then closes, in place of the first files."""

    first: ClassVar[list[bytes]] = []

    def do_GET(self) -> None:
        if not self.first:
            super().do_GET()
            return
        content = self.first.pop(0)
        self.send_response(200)
        self.send_header("Content-Length", str(60_000))
        self.end_headers()
        for byte in content:
            self.wfile.write(bytes([byte]))
            time.sleep(0.02)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url(shards: Path) -> Iterator[str]:
    handler = partial(Handler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _cache(tmp_path: Path, limit: int = LIMIT) -> Cache:
    return Cache(folder=tmp_path / "cache", limit=limit)


def _stream(source: str | Path, cache: Cache | None = None, rank: int = 0, world_size: int = 1) -> TokenStream:
    return TokenStream(source, micro_batch=16 // world_size, seed=0, rank=rank, world_size=world_size, cache=cache)


def _draw(tokens: TokenStream, steps: int) -> list[list[int]]:
    batches = [next(tokens) for _ in range(steps)]
    assert all(torch.equal(batch, batch[:, :1].expand(-1, T)) for batch in batches)
    return [batch[:, 0].tolist() for batch in batches]


def test_blocks_of_shards_are_shuffled(shards: Path) -> None:
    """Each sample once an epoch, few shards at a time, other ones beside each other in each epoch."""
    epochs = np.array(_draw(_stream(shards), 50)).reshape(2, SAMPLES)
    assert (np.sort(epochs, axis=1) == np.arange(SAMPLES)).all()
    for epoch in epochs:
        assert len(np.unique(epoch[:60] // (SAMPLES // SHARDS))) <= 6
    assert set(epochs[0][:60]) != set(epochs[1][:60])


@pytest.mark.parametrize("compression", ["", "zstd"])
def test_the_order_is_that_of_the_folder_wherever_the_shards_are(
    shards: Path, url: str, tmp_path: Path, compression: str
) -> None:
    expected = _draw(_stream(shards), 40)
    assert _draw(_stream(url, _cache(tmp_path / "a")), 40) == expected
    other = _write(tmp_path / "other", compression)
    verify_shards(other, "mine", T)
    assert _draw(_stream(other, _cache(tmp_path / "b")), 40) == expected


def test_ranks_of_another_number_go_on_in_the_same_order(url: str, tmp_path: Path) -> None:
    """All with one cache, which is never larger than it may be."""
    cache = _cache(tmp_path)
    expected = _draw(_stream(url, cache), 60)
    drawn: list[list[int]] = []
    state = _stream(url, cache).state_dict()
    for world_size in (1, 2, 4, 2, 1):
        ranks = [_stream(url, cache, rank, world_size) for rank in range(world_size)]
        for rank in ranks:
            rank.load_state_dict(state)
        for _ in range(12):
            drawn.append([sample for rank in ranks for sample in _draw(rank, 1)[0]])
            with exclusive(cache.folder / "lock"):
                assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= LIMIT
        state = ranks[0].state_dict()  # and here they are killed
    assert drawn == expected


def test_shards_are_there_before_they_are_needed(url: str, tmp_path: Path) -> None:
    reader = ShardReader(url, _cache(tmp_path))
    reader.prepare([3, 4])
    assert reader.read(3 * 20)[0] == 60
    reader.read(4 * 20)
    assert len(list((tmp_path / "cache").glob("*.mds"))) == 2


def test_a_killed_process_blocks_nobody(shards: Path, tmp_path: Path) -> None:
    """What it had half written is written anew, and no shared memory is left."""
    cache = _cache(tmp_path)
    before = set(os.listdir("/dev/shm"))
    pid = os.fork()
    if pid == 0:
        with exclusive(_made(cache.folder) / "lock"):
            (cache.folder / "half.mds.partial").write_bytes(b"x" * LIMIT)
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert _draw(_stream(shards, cache), 30) == _draw(_stream(shards), 30)
    assert not list(cache.folder.glob("*.partial*"))
    assert set(os.listdir("/dev/shm")) == before


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_damage_is_found_on_the_way(shards: Path, url: str, tmp_path: Path) -> None:
    shard = shards / "000007" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"000007/shard.00000.mds is truncated or altered"):
        _draw(_stream(url, _cache(tmp_path)), 25)
    shard.unlink()
    with pytest.raises(UserError, match=r"000007/shard.00000.mds cannot be fetched: .*404"):
        _draw(_stream(url, _cache(tmp_path)), 25)
    with pytest.raises(UserError, match=r"000007/shard.00000.mds is missing"):
        _draw(_stream(shards), 25)


def test_transfers_that_are_cut_are_tried_again(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "first", [b"cut"])
    with pytest.raises(UserError, match=r"manifest.json cannot be fetched: cut off after 3 of 60000 bytes"):
        verify_shards(url, "mine", T)
    monkeypatch.setattr(storage, "TRIES", 2)
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    monkeypatch.setattr(Handler, "first", [b"cut"])
    assert verify_shards(url, "mine", T)["samples"] == SAMPLES


def test_transfers_end(shards: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow they are, and however much is sent."""
    monkeypatch.setattr(storage, "TIMEOUT", 0.2)
    monkeypatch.setattr(Handler, "first", [b"slow" * 1000])
    with pytest.raises(UserError, match=r"manifest.json cannot be fetched: slower than 10,000 bytes a second"):
        verify_shards(url, "mine", T)
    monkeypatch.setattr(storage, "SMALL_FILE", 100)
    for source in (url, shards):
        with pytest.raises(UserError, match=r"manifest.json has .* bytes"):
            verify_shards(source, "mine", T)
    with pytest.raises(UserError, match=r"manifest.json has more than the 10 bytes that it may have"):
        storage.fetch(url, "manifest.json", tmp_path / "file", 10)
    assert not (tmp_path / "file").exists()


def test_what_cannot_be(shards: Path, url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are in object storage: name a folder on the nodes' own disks"):
        _stream(url)
    with pytest.raises(UserError, match="are compressed: name a folder on the nodes' own disks"):
        _stream(_write(tmp_path / "small", "zstd"))
    with pytest.raises(UserError, match=r"shards_cache_gb is too small"):
        _stream(url, _cache(tmp_path, limit=20_000))
    with pytest.raises(UserError, match=r"none/manifest.json cannot be fetched"):
        verify_shards(f"{url}/none", "mine", T)
    with pytest.raises(UserError, match=r"cannot be fetched: .*ftp"):
        verify_shards("ftp://nowhere", "mine", T)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the cache of shards .* cannot be written"):
        next(_stream(shards, Cache(folder=tmp_path / "file", limit=LIMIT)))
    assert verify_shards(url, "mine", T)["samples"] == SAMPLES
