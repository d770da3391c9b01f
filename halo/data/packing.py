"""How documents become samples: which part of the text each belongs to, and how they fill samples of one length.

Documents follow each other, a separator token after each, and are cut wherever a sample is full. No token is lost or
padded: what is left at the end, shorter than a sample, is returned to the caller.
"""

from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np

HELD_OUT = "held_out"
"""The part that no stage trains on."""
TEXTS_PER_CALL = 256
"""Documents that a tokenizer encodes in one call."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One stage's part of the text."""

    seq_len: int
    tokens: int
    """How many the stage needs. Relative to the other parts', this is its share of the documents."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """All settings that decide the bytes of the shards, except the tokenizer."""

    parts: dict[str, Part]
    held_out: float
    """The share of documents that belongs to no stage."""
    seed: int
    separator: int
    """The token after each document."""
    dtype: str
    compression: str
    """"zstd" or "" (none)."""

    def part_of(self, text: str) -> str:
        """The part that a document belongs to.

        Only its text and the seed decide: two parts never share a document, even if the source has it twice.
        """
        digest = blake2b(text.encode(), digest_size=8, key=str(self.seed).encode()).digest()
        return self._names[bisect(self._edges, int.from_bytes(digest, "big") / 2**64)]

    @cached_property
    def _names(self) -> list[str]:
        return [HELD_OUT, *self.parts]

    @cached_property
    def _edges(self) -> list[float]:
        tokens = np.array([part.tokens for part in self.parts.values()], float)
        ends = self.held_out + (1 - self.held_out) * np.cumsum(tokens / tokens.sum())
        return [self.held_out, *ends[:-1].tolist()]


def token_dtype(vocabulary: int) -> np.dtype:
    """The smallest unsigned type for token ids below `vocabulary`: uint16 or uint32."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def join_documents(documents: Iterable[Sequence[int] | np.ndarray], separator: int, dtype: np.dtype) -> np.ndarray:
    """The token ids of all documents, the separator after each: [tokens] of `dtype`."""
    end = np.array([separator], dtype)
    arrays = [array for ids in documents for array in (np.asarray(ids, dtype), end)]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def cut_samples(tokens: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, seq_len] whole samples, and the [R] tokens left over, R < seq_len."""
    whole = len(tokens) - len(tokens) % seq_len
    return tokens[:whole].reshape(-1, seq_len), tokens[whole:]


def pack_documents(
    documents: Iterable[Sequence[int]], *, seq_len: int, separator: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """`join_documents` and `cut_samples` for documents without end: [seq_len] each, and last what is left over, if any.

    Only one document and less than one sample are in memory at a time.
    """
    rest = np.empty(0, dtype)
    for ids in documents:
        samples, rest = cut_samples(np.concatenate([rest, join_documents([ids], separator, dtype)]), seq_len)
        yield from samples
    if len(rest):
        yield rest
