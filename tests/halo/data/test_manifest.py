"""What foreign shards say is checked before it is a dtype, a path or a token."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from halo.data.manifest import checked_index, checked_manifest
from halo.data.reader import ShardReader
from halo.data.shards import INDEX, SHARDS_MANIFEST, open_manifest, verify_shards, write_shards
from halo.data.storage import Cache
from halo.errors import UserError
from halo.names import inner_path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tokens = np.random.default_rng(0).integers(0, 64, (60, 16)).astype(np.uint16)
    write_shards(tmp_path / "shards", tokens, {"tokenizer": "none"})
    return tmp_path / "shards"


def change(folder: Path, *keys: str | int, to: object, file: str = SHARDS_MANIFEST) -> None:
    """Change a value in a JSON file of shards; after a change of the index, its hash is that of the new one."""
    document = json.loads((folder / file).read_text())
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    (folder / file).write_text(json.dumps(document))
    if file == INDEX:
        change(folder, "sha256", INDEX, to=sha256((folder / INDEX).read_bytes()).hexdigest())


def read_all(folder: Path, cache: Path | None = None) -> None:
    manifest = verify_shards(folder, "none", 16)
    reader = ShardReader(folder, cache and Cache(folder=cache, limit=10**8))
    for number in range(manifest["samples"]):
        reader.read(number)


@pytest.mark.parametrize("dtype", ["object", "bool", "uint8", "int64", "O", ">u2", None, 7, ["uint16"]])
def test_only_the_dtypes_of_tokens_are_read(shards, dtype):
    change(shards, "dtype", to=dtype)
    with pytest.raises(UserError, match=r"manifest\.json is not valid: dtype"):
        read_all(shards)


@pytest.mark.parametrize("encoding", ["ndarray:uint32:16", "ndarray:uint16:17", "pkl", "ndarray:object:16"])
def test_the_index_has_the_manifests_encoding(shards, encoding):
    change(shards, "shards", 0, "column_encodings", to=[encoding], file=INDEX)
    with pytest.raises(UserError, match="its manifest says ndarray:uint16:16"):
        read_all(shards)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "", ".", "..", "a/../../x", "a//b", "a\\b", "a\0b", "a\nb", "~x"]
)
def test_a_name_stays_in_its_folder(shards, tmp_path, name):
    with pytest.raises(ValueError, match="is not the name of a file in its folder"):
        inner_path(name)
    change(shards, "shards", 0, "raw_data", "basename", to=name, file=INDEX)
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(UserError, match=r"the index of the shards in .* is not valid"):
            read_all(shards, cache)


@pytest.mark.parametrize("digest", ["../../x/own", "", "0" * 63, "Z" * 64, 5, None])
def test_a_digest_is_one(shards, tmp_path, digest):
    change(shards, "sha256", "shard.00000.mds", to=digest)
    with pytest.raises(UserError, match=r"manifest\.json is not valid: sha256"):
        read_all(shards, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("shards", 0, "samples"), 10**8, "too small for 100000000 samples"),
        (("shards", 0, "samples"), -1, "is not valid"),
        (("shards", 0, "samples"), 59, "has 59 samples, not 60"),
        (("shards",), [], "is not valid"),
        (("shards",), {"a": 1}, "is not valid"),
        (("shards", 0), None, "is not valid"),
        (("shards", 0, "raw_data"), [], "is not valid"),
        (("shards", 0, "raw_data", "bytes"), 2**60, "is not valid"),
        (("shards", 0, "raw_data", "bytes"), 2**33, "is not valid"),
        (("shards", 0, "samples"), 2**28 + 1, "is not valid"),
        (("shards", 0, "raw_data", "basename"), "other.mds", "has no hash in the manifest"),
    ],
)
def test_an_index_that_lies_is_refused_in_one_line(shards, keys, value, said):
    change(shards, *keys, to=value, file=INDEX)
    with pytest.raises(UserError, match=said) as refused:
        read_all(shards)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"5", b"\xff\xfe", b"{", b'{"samples": true}', b"[" * 100_000]
)
def test_a_file_of_another_shape_is_refused(shards, content):
    (shards / SHARDS_MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json (is (not valid|empty)|begins with)"):
        open_manifest(shards)
    with pytest.raises(UserError, match=r"is (not valid|empty)|begins with"):
        checked_index(shards, content, {"seq_len": 16, "dtype": "uint16", "samples": 60, "sha256": {}})


def test_tokens_beyond_the_vocabulary_are_refused(shards):
    reader = ShardReader(shards, words=64)
    assert reader.read(3).max() < 64
    with pytest.raises(UserError, match=r"has the token 63, but the model has 63"):
        ShardReader(shards, words=63).read(3)


def test_a_cached_file_that_changed_is_made_anew(shards, tmp_path):
    first = ShardReader(shards, Cache(folder=tmp_path / "cache", limit=10**8)).read(0).copy()
    (cached,) = (tmp_path / "cache").glob("*.mds")
    damaged = bytearray(cached.read_bytes())
    damaged[-1] ^= 1
    cached.write_bytes(damaged)
    again = ShardReader(shards, Cache(folder=tmp_path / "cache", limit=10**8))
    assert np.array_equal(again.read(0), first)
    assert cached.read_bytes() != damaged


def test_what_we_write_is_taken(shards):
    assert checked_manifest("x", (shards / SHARDS_MANIFEST).read_bytes(), "y")["samples"] == 60
