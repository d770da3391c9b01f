"""Token shards on disk: text in, a folder of MDS files and a manifest out.

A folder is written beside its final place and renamed when it is complete, so that what bears its name is whole. Its
`manifest.json` says what it was made from and holds the SHA-256 of every other file.
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
from transformers import PreTrainedTokenizerBase

from halo.data.corpus import HELD_OUT_EVERY, Part, read_documents
from halo.data.needle import EVAL_KEYS, TRAIN_KEYS, VARIANTS, Prose, build_needle
from halo.data.storage import is_remote, read_bytes
from halo.errors import UserError
from halo.models.tokenizer import separator_id
from halo.models.tokenizer import tokenizer_hash as hash_of
from halo.run import atomic_folder, sha256

COLUMN = "input_ids"
MANIFEST = "manifest.json"
INDEX = "index.json"

# Documents are shuffled within blocks of this many, and needles are hidden in the text of the first block.
_BLOCK = 2048
_TOKENIZE_TOGETHER = 64


def prepare_shards(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    seq_len: int,
    seed: int,
    part: Part = "train",
    samples: int | None = None,
    needle_fraction: float = 0.0,
) -> dict[str, Any]:
    """Write samples of `seq_len` tokens from one part of a text source to `folder`, and return the manifest.

    A sample is a needle test with its answer (with probability `needle_fraction`, all variants equally likely; the
    training keys for the training part, the others for the held-out part), or else the next `seq_len` tokens of the
    documents. Without `samples`, each document is used once; with it, as often as that many samples need.

    Raises:
        UserError: `folder` exists, the source cannot be read or is too small, or needles do not fit into `seq_len`.
    """
    if seq_len < 1 or (samples is not None and samples < 1):
        raise UserError(f"{samples} samples of {seq_len} tokens: both numbers must be at least 1")
    if not 0 <= needle_fraction <= 1:
        raise UserError(f"needle_fraction is {needle_fraction}; it must be from 0 to 1")
    if needle_fraction == 1 and samples is None:
        raise UserError("needle_fraction is 1, so the documents never come to an end: give a number of samples")
    if next(read_documents(source, part), None) is None:
        raise UserError(f"{source} has no {part} documents (one in {HELD_OUT_EVERY} is held out)")
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    order_rng, needle_rng = np.random.default_rng(seed).spawn(2)
    meta: dict[str, Any] = {
        "source": str(source),
        "part": part,
        "tokenizer": hash_of(tokenizer),
        "separator": separator_id(tokenizer),
        "seed": seed,
        "needle_fraction": needle_fraction,
        "tokens_left_over": 0,
    }
    documents = _tokenized(source, part, tokenizer, order_rng, endless=samples is not None)
    packed = pack_documents(documents, seq_len=seq_len, eos=separator_id(tokenizer), dtype=dtype)
    needles = _needles(source, part, tokenizer, seq_len, dtype, needle_rng) if needle_fraction else iter(())

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


def pack_documents(documents: Iterable[list[int]], *, seq_len: int, eos: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The ids of all documents in a row, `eos` after each, cut every `seq_len`. Only the last array may be shorter."""
    rest = np.empty(0, dtype)
    for ids in documents:
        tokens = np.concatenate([rest, np.asarray([*ids, eos], dtype)])
        whole = len(tokens) - len(tokens) % seq_len
        yield from tokens[:whole].reshape(-1, seq_len)
        rest = tokens[whole:]
    if len(rest):
        yield rest


def write_shards(folder: str | Path, samples: Iterable[np.ndarray], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Write samples, all of one dtype and length, as MDS shards, and return the manifest: `meta` and what was written.

    `meta` is read after the last sample, so that what makes the samples may count in it.

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
        with MDSWriter(out=str(partial), columns={COLUMN: f"ndarray:{first.dtype.name}:{len(first)}"}) as writer:
            for sample in chain([first], remaining):
                writer.write({COLUMN: sample})
                count += 1
        manifest = {
            **meta,
            "samples": count,
            "seq_len": len(first),
            "dtype": first.dtype.name,
            "sha256": {path.name: sha256(path) for path in sorted(partial.iterdir())},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def open_manifest(source: str | Path) -> dict[str, Any]:
    """The manifest of a folder or URL of shards.

    Raises:
        UserError: it has none, or a damaged one.
    """
    try:
        manifest = json.loads(read_bytes(source, MANIFEST))
        _ = [manifest[name] for name in ("samples", "seq_len", "dtype", "sha256")]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{source} holds no token shards (it has no {MANIFEST}); prepare them first") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}/{MANIFEST} is damaged; remove {source} and prepare it anew") from error
    return manifest


def verify_shards(source: str | Path, tokenizer_hash: str, seq_len: int) -> dict[str, Any]:
    """Check that shards are complete and fit for this tokenizer and length, and return their manifest.

    Every shard must be there, as long as it was written; what is in it is verified when it is first read
    (halo/data/reader.py). Of a URL, the manifest and the index are looked at.

    Raises:
        UserError: they are not.
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
    if sha256_of(index).hexdigest() != manifest["sha256"][INDEX]:
        raise UserError(f"{source}/{INDEX} is truncated or altered; remove {source} and prepare it anew")
    if not is_remote(source):
        for shard in json.loads(index)["shards"]:
            stored = shard["zip_data"] or shard["raw_data"]
            path = Path(source, stored["basename"])
            if not path.is_file():
                raise UserError(f"{path} is missing; remove {source} and prepare it anew")
            if path.stat().st_size != stored["bytes"]:
                raise UserError(f"{path} is truncated or altered; remove {source} and prepare it anew")
    return manifest


def _tokenized(
    source: str | Path, part: Part, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, *, endless: bool
) -> Iterator[list[int]]:
    """The documents as ids, in another order each time around."""
    while True:
        documents = read_documents(source, part)
        while block := list(islice(documents, _BLOCK)):
            rng.shuffle(block)
            for begin in range(0, len(block), _TOKENIZE_TOGETHER):
                texts = block[begin : begin + _TOKENIZE_TOGETHER]
                yield from tokenizer(texts, add_special_tokens=False)["input_ids"]
        if not endless:
            return


def _needles(
    source: str | Path,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    dtype: np.dtype,
    rng: np.random.Generator,
) -> Iterator[np.ndarray]:
    prose = Prose(tokenizer, islice(read_documents(source, part), _BLOCK))
    keys = TRAIN_KEYS if part == "train" else EVAL_KEYS
    while True:
        variant = VARIANTS[rng.integers(len(VARIANTS))]
        try:
            needle = build_needle(tokenizer, variant, seq_len, rng, keys, prose)
        except ValueError as error:
            raise UserError(f"no needle samples of {seq_len} tokens from {source}: {error}") from error
        yield np.asarray(needle.prompt_ids + needle.answer_ids, dtype)
