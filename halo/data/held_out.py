"""The held-out text of a run. Selection, the choice of the base a (Eq. 11), and evaluation measure on it."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from halo.data.corpus import read_documents, text_files
from halo.data.needle import EVAL_KEYS, NeedleSample, Prose, build_needle
from halo.data.packing import cut_samples, join_documents
from halo.errors import UserError
from halo.models.tokenizer import separator_id

CHARACTERS = 1 << 24
"""Characters of held-out text that are read: about four million tokens, enough for haystacks of a million."""


class HeldOut:
    """The first held-out documents, as text and as token ids.

    Args:
        source: a folder or file of documents.
        characters: documents are read until they have so many together.

    Raises:
        UserError: no source is set, or none of its documents is held out.
    """

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerFast, characters: int = CHARACTERS):
        check_held_out(source)
        self.tokenizer = tokenizer
        self.documents = list(_until(read_documents(source, "held_out"), characters))
        if not self.documents:
            raise UserError(f"{source} has too few documents to hold any out: set `heldout` to a larger source")
        self.prose = Prose(tokenizer, self.documents)

    def needles(self, variant: str, length: int, count: int, seed: int) -> list[NeedleSample]:
        """`count` needle samples, with keys and haystacks that are in no training sample.

        Raises:
            UserError: `length` is too short for a needle, or longer than the held-out text.
        """
        rng = np.random.default_rng([seed, length])
        try:
            return [build_needle(self.tokenizer, variant, length, rng, EVAL_KEYS, self.prose) for _ in range(count)]
        except ValueError as error:
            raise UserError(f"no {variant} samples of {length} tokens from `heldout`: {error}") from error

    def token_ids(self) -> Sequence[np.ndarray]:
        """The token ids of each document, int64 [tokens]."""
        return self._token_ids

    @cached_property
    def _token_ids(self) -> list[np.ndarray]:
        ids = self.tokenizer(self.documents, add_special_tokens=False)["input_ids"]
        return [np.asarray(document, np.int64) for document in ids]

    def windows(self, length: int, count: int) -> tuple[Tensor, int]:
        """`count` windows of text, or as many as there are.

        Those within one document come first, where only long context helps: the first of each document, then the second
        of each, and so on. What is missing is cut from all other documents, joined.

        Returns:
            Int64 [count, length], and how many of them lie within one document.

        Raises:
            UserError: the documents are too short for one window.
        """
        long = [cut_samples(ids, length)[0] for ids in self._token_ids]
        turns = zip_longest(*long)
        within = list(islice((window for turn in turns for window in turn if window is not None), count))
        short = [ids for ids in self._token_ids if len(ids) < length]
        tokens = join_documents(short, separator_id(self.tokenizer), np.dtype(np.int64))
        windows = [*within, *cut_samples(tokens, length)[0][: count - len(within)]]
        if not windows:
            raise UserError(f"`heldout` has {len(tokens)} held-out tokens, fewer than one window of {length}")
        return torch.from_numpy(np.stack(windows)), len(within)


def check_held_out(source: str) -> None:
    """Whether there is a source to read, found out without reading it.

    Raises:
        UserError: none is set, or there is nothing to read.
    """
    if not source:
        raise UserError(
            "the preset's `heldout` is empty: set it to a folder of text, whose held-out documents are then used"
        )
    text_files(Path(source))


def held_out_digest(source: str) -> str:
    """A digest of the documents that `HeldOut` reads for the measuring stages.

    Raises:
        UserError: they cannot be read.
    """
    digest = hashlib.sha256()
    for document in _until(read_documents(source, "held_out"), CHARACTERS):
        content = document.encode(errors="surrogatepass")
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()


def _until(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Whole documents, until they have `characters` together."""
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return
