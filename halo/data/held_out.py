"""The held-out part of a run's text: what selection, the choice of a, and evaluation measure on."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halo.data.corpus import read_documents
from halo.data.needle import EVAL_KEYS, NeedleSample, Prose, build_needle
from halo.errors import UserError
from halo.models.tokenizer import separator_id

CHARACTERS = 1 << 24
"""How much held-out text is read: some four million tokens, enough for haystacks of a million."""


class HeldOut:
    """The first CHARACTERS of the held-out documents, as text and as token ids.

    Raises:
        UserError: no source is set, or nothing in it is held out.
    """

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase):
        if not source:
            raise UserError(
                "the preset's `heldout` is empty: name a folder of text whose held-out documents to measure on"
            )
        self.tokenizer = tokenizer
        self.documents = list(_until(read_documents(source, "held_out"), CHARACTERS))
        if not self.documents:
            raise UserError(f"{source} has too few documents to hold any out: name a larger one as `heldout`")
        self.prose = Prose(tokenizer, self.documents)

    def needles(self, variant: str, length: int, count: int, seed: int) -> list[NeedleSample]:
        """`count` needle samples with keys and haystacks that no training sample has."""
        rng = np.random.default_rng([seed, length])
        try:
            return [build_needle(self.tokenizer, variant, length, rng, EVAL_KEYS, self.prose) for _ in range(count)]
        except ValueError as error:
            raise UserError(f"no {variant} samples of {length} tokens from `heldout`: {error}") from error

    def token_ids(self) -> Sequence[np.ndarray]:
        """Each document's token ids."""
        ids = self.tokenizer(self.documents, add_special_tokens=False)["input_ids"]
        return [np.asarray(document) for document in ids]

    def windows(self, length: int, count: int) -> Tensor:
        """[count, length] consecutive windows over the documents, EOS between them.

        Raises:
            UserError: the documents are too short for one window.
        """
        stream = np.concatenate([np.append(ids, separator_id(self.tokenizer)) for ids in self.token_ids()])
        count = min(count, len(stream) // length)
        if count == 0:
            raise UserError(f"`heldout` has {len(stream)} held-out tokens, fewer than one window of {length}")
        return torch.from_numpy(stream[: count * length].reshape(count, length))


def _until(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Whole documents, until they hold `characters`."""
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return
