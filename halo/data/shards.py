"""Token shards on disk: samples, as a folder of MDS files and a manifest.

A folder is written under another name and renamed when it is complete, so a folder with the right name is whole. Its
`manifest.json` records what the shards were made from, and the SHA-256 of every other file.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256 as sha256_of
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from halo.data.corpus import read_documents, text_digest
from halo.data.manifest import checked_index, checked_manifest
from halo.data.needle import TRAIN_KEYS, VARIANTS, Prose, build_needle
from halo.data.packing import TEXTS_PER_CALL, pack_documents, token_dtype
from halo.data.storage import is_remote, read_bytes
from halo.errors import UserError
from halo.graph import NEEDLE_RECIPE
from halo.json_files import read_json
from halo.models.tokenizer import separator_id
from halo.models.tokenizer import tokenizer_hash as hash_of
from halo.run import atomic_folder, sha256

SHARDS_MANIFEST = "manifest.json"
INDEX = "index.json"

_COLUMN = "input_ids"
_SHUFFLED_TOGETHER = 2048
"""Documents are shuffled in groups of this size, and needles are hidden in the text of the first group."""


def prepare_shards(
    source: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    seq_len: int,
    seed: int,
    samples: int | None = None,
    needle_fraction: float = 0.0,
) -> dict[str, Any]:
    """Write samples of `seq_len` tokens from the training split of a text source to `folder`. Returns the manifest.

    A sample is a needle test with its answer (with probability `needle_fraction`, all variants equally likely), or
    else the next `seq_len` tokens of the documents. Without `samples`, each document is used once; with it, as often
    as that many samples need.

    Raises:
        UserError: `folder` exists, the source cannot be read or is too small, or needles do not fit into `seq_len`.
    """
    if seq_len < 1 or (samples is not None and samples < 1):
        raise UserError(f"{samples} samples of {seq_len} tokens: both numbers must be at least 1")
    if not 0 <= needle_fraction <= 1:
        raise UserError(f"needle_fraction is {needle_fraction}; it must be from 0 to 1")
    if needle_fraction == 1 and samples is None:
        raise UserError("needle_fraction is 1, so the documents never come to an end: give a number of samples")
    if next(read_documents(source, "train"), None) is None:
        raise UserError(f"{source} has no text to train on: every document is empty or held out")
    dtype = token_dtype(len(tokenizer))
    order_rng, needle_rng = np.random.default_rng(seed).spawn(2)
    meta: dict[str, Any] = {
        "source": str(source),
        "source_digest": text_digest(source),
        "part": "train",
        "tokenizer": hash_of(tokenizer),
        "separator": separator_id(tokenizer),
        "seed": seed,
        "needle_fraction": needle_fraction,
        "needle_recipe": NEEDLE_RECIPE,
        "tokens_left_over": 0,
    }
    documents = _tokenized(source, tokenizer, order_rng, endless=samples is not None)
    packed = pack_documents(documents, seq_len=seq_len, separator=separator_id(tokenizer), dtype=dtype)
    needles = _needles(source, tokenizer, seq_len, dtype, needle_rng) if needle_fraction else iter(())

    def mixed() -> Iterator[np.ndarray]:
        with tqdm(total=samples, desc=f"prepare {Path(folder).name}", unit=" samples", leave=False) as bar:
            for _ in count() if samples is None else range(samples):
                if needle_rng.random() < needle_fraction:
                    sample = next(needles)
                else:
                    sample = next(packed, np.empty(0, dtype))
                    if len(sample) < seq_len:
                        meta["tokens_left_over"] = len(sample)
                        return
                yield sample
                bar.update()

    return write_shards(folder, mixed(), meta)


def write_shards(folder: str | Path, samples: Iterable[np.ndarray], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Write samples [T], all of one dtype and length, and a manifest: `meta` and what was written. Returns the latter.

    `meta` is read after the last sample, so the iterator of samples may still add to it.

    Raises:
        UserError: `folder` exists, or there are no samples.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it to prepare it anew")
    remaining = iter(samples)
    first = next(remaining, None)
    if first is None:
        raise UserError(f"not one full sample to write to {folder}: the source is too small")
    count = 0
    with atomic_folder(folder) as partial:
        with _mds_writer(partial, first) as writer:
            for sample in chain([first], remaining):
                writer.write({_COLUMN: sample})
                count += 1
        manifest = {
            **meta,
            "samples": count,
            "seq_len": len(first),
            "dtype": first.dtype.name,
            "sha256": {path.name: sha256(path) for path in sorted(partial.iterdir())},
        }
        (partial / SHARDS_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def write_samples(folder: Path, name: str, samples: np.ndarray, compression: str) -> list[dict[str, Any]]:
    """Write samples [N, T] as some of the shards of `folder`, in its subfolder `name`.

    Args:
        compression: "zstd" or "" (none).

    Returns:
        The entries of these shards for the index of `folder`, which the caller writes.
    """
    if not len(samples):
        return []
    with atomic_folder(folder / name) as partial:
        with _mds_writer(partial, samples[0], compression=compression or None, hashes=["sha256"]) as writer:
            for sample in samples:
                writer.write({_COLUMN: sample})
        index = partial / INDEX
        shards = read_json(index, dict[str, Any], f"remove {folder}")["shards"]
        index.unlink()
    for shard in shards:
        for file in (shard["raw_data"], shard["zip_data"]):
            if file:
                file["basename"] = f"{name}/{file['basename']}"
    return shards


def _mds_writer(folder: Path, sample: np.ndarray, **options: Any) -> MDSWriter:
    """A writer of samples of the length and dtype of this one."""
    return MDSWriter(out=str(folder), columns={_COLUMN: f"ndarray:{sample.dtype.name}:{len(sample)}"}, **options)


def open_manifest(source: str | Path) -> dict[str, Any]:
    """The manifest of a folder or URL of shards.

    Raises:
        UserError: there is no manifest, or it is damaged.
    """
    try:
        content = read_bytes(source, SHARDS_MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{source} holds no token shards (it has no {SHARDS_MANIFEST}); prepare them first") from error
    return checked_manifest(f"{source}/{SHARDS_MANIFEST}", content, f"remove {source} and prepare it anew")


def verify_shards(source: str | Path, tokenizer_hash: str, seq_len: int) -> dict[str, Any]:
    """Check that shards are complete and were made with this tokenizer and length. Returns their manifest.

    Every file must exist and have its recorded size. Contents are verified when a shard is first read
    (halo/data/reader.py). For a URL, only the manifest and the index are checked.

    Raises:
        UserError: they are not complete, or were made for something else.
    """
    manifest = open_manifest(source)
    if manifest.get("tokenizer") != tokenizer_hash:
        raise UserError(f"the shards in {source} were made with another tokenizer; prepare them with this one")
    if manifest["seq_len"] != seq_len:
        raise UserError(f"the shards in {source} hold samples of {manifest['seq_len']} tokens, not {seq_len}")
    try:
        index = read_bytes(source, INDEX)
    except FileNotFoundError as error:
        raise UserError(f"{source}/{INDEX} is missing; remove {source} and prepare it anew") from error
    if sha256_of(index).hexdigest() != manifest["sha256"].get(INDEX):
        raise UserError(f"{source}/{INDEX} is truncated or altered; remove {source} and prepare it anew")
    shards = checked_index(source, index, manifest)
    if not is_remote(source):
        for shard in shards:
            path = Path(source, shard.stored.basename)
            if not path.is_file():
                raise UserError(f"{path} is missing; remove {source} and prepare it anew")
            if path.stat().st_size != shard.stored.bytes:
                raise UserError(f"{path} is truncated or altered; remove {source} and prepare it anew")
    return manifest


def _tokenized(
    source: str | Path, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, *, endless: bool
) -> Iterator[list[int]]:
    """The documents as token ids, in another order in each pass."""
    while True:
        documents = read_documents(source, "train")
        while group := list(islice(documents, _SHUFFLED_TOGETHER)):
            rng.shuffle(group)
            for begin in range(0, len(group), TEXTS_PER_CALL):
                texts = group[begin : begin + TEXTS_PER_CALL]
                yield from tokenizer(texts, add_special_tokens=False)["input_ids"]
        if not endless:
            return


def _needles(
    source: str | Path, tokenizer: PreTrainedTokenizerFast, seq_len: int, dtype: np.dtype, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    prose = Prose(tokenizer, islice(read_documents(source, "train"), _SHUFFLED_TOGETHER))
    while True:
        variant = VARIANTS[rng.integers(len(VARIANTS))]
        try:
            needle = build_needle(tokenizer, variant, seq_len, rng, TRAIN_KEYS, prose)
        except ValueError as error:
            raise UserError(f"no needle samples of {seq_len} tokens from {source}: {error}") from error
        yield np.asarray(needle.prompt_ids + needle.answer_ids, dtype)
