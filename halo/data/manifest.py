"""What the manifest and the index of token shards may say. Shards come from anywhere: nothing in them is believed.

A dtype other than those of token ids would let the reader follow addresses; a name that leads out of the folder would
let it read and write there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from halo.errors import UserError
from halo.json_files import parse_json
from halo.names import Digest, InnerPath

SampleCount = Annotated[int, Field(strict=True, ge=1, le=2**28)]
"""A process holds the order of all samples of an epoch: 2 GiB for the most."""
Size = Annotated[int, Field(strict=True, ge=0, le=2**32)]
"""Bytes of a shard, in which places are numbers of 32 bits."""

TOKEN_SIZES = {"uint16": 2, "uint32": 4}
"""The dtypes of token ids, and their bytes."""


class Manifest(BaseModel, extra="allow"):
    """What every manifest of shards has; the rest is what they were made from."""

    samples: SampleCount
    seq_len: Annotated[int, Field(strict=True, ge=1, le=2**31)]
    dtype: Literal["uint16", "uint32"]
    sha256: dict[InnerPath, Digest]


class StoredFile(BaseModel, extra="ignore"):
    basename: InnerPath
    bytes: Size


class ShardEntry(BaseModel, extra="ignore"):
    """A shard of an index, as `streaming` writes it."""

    samples: SampleCount
    raw_data: StoredFile
    zip_data: StoredFile | None = None
    compression: str | None = None
    column_names: list[str]
    column_encodings: list[str]

    @property
    def stored(self) -> StoredFile:
        """The file that exists: the compressed one, if it is compressed."""
        return self.zip_data or self.raw_data


class ShardIndex(BaseModel, extra="ignore"):
    shards: Annotated[list[ShardEntry], Field(min_length=1)]


def checked_manifest(where: str, content: bytes, then: str) -> dict[str, Any]:
    """A manifest from its file.

    Args:
        where, then: the file, and what to do if it is damaged.

    Raises:
        UserError: it is no manifest of token shards.
    """
    return parse_json(content, Manifest, where, then).model_dump()


def checked_index(source: str | Path, content: bytes, manifest: Mapping[str, Any]) -> list[ShardEntry]:
    """The shards that an index lists: those of the manifest, with its dtype and length.

    Raises:
        UserError: they are not, or the index is damaged.
    """
    anew = f"remove {source} and prepare it anew"
    shards = parse_json(content, ShardIndex, f"the index of the shards in {source}", anew).shards
    seq_len, dtype = manifest["seq_len"], manifest["dtype"]
    encoding = [f"ndarray:{dtype}:{seq_len}"]
    for shard in shards:
        name = shard.raw_data.basename
        if shard.column_encodings != encoding:
            raise UserError(
                f"{source}/{name} holds {', '.join(shard.column_encodings)}, its manifest says {encoding[0]}: {anew}"
            )
        if shard.raw_data.bytes < shard.samples * seq_len * TOKEN_SIZES[dtype]:
            raise UserError(f"{source}/{name} is too small for {shard.samples} samples of {seq_len} tokens: {anew}")
        if shard.stored.basename not in manifest["sha256"]:
            raise UserError(f"{source}/{shard.stored.basename} has no hash in the manifest: {anew}")
    count = sum(shard.samples for shard in shards)
    if count != manifest["samples"]:
        raise UserError(f"the index of the shards in {source} has {count} samples, not {manifest['samples']}: {anew}")
    return shards
