"""RULER's single-needle tests, in RULER's wording, at an exact length in tokens of any tokenizer.

    A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the
    number afterwards.
    <haystack, and in it: One of the special magic numbers for quiet-river is: 7310554.>
    What is the special magic number for quiet-river mentioned in the provided text? The special magic number for
    quiet-river mentioned in the provided text is| 7310554

The wording is encoded as one text, with a word in place of the haystack, and each sentence of the haystack after a
word: so all tokens are those of running text, and the answer's are those of the needle. SentencePiece's tokenizers
begin what is encoded alone with a space of its own. Where the ids are joined a byte-level tokenizer cuts anyway.
"""

import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product

import numpy as np
from transformers import PreTrainedTokenizerFast

from halo.models.tokenizer import encode_parts

VARIANTS = ("niah_single_1", "niah_single_2", "niah_single_3")


def _keys(adjectives: str, nouns: str) -> tuple[str, ...]:
    return tuple(f"{adjective}-{noun}" for adjective, noun in product(adjectives.split(), nouns.split()))


# 400 keys each. They share no word, and have a similar mix of common and rare words.
TRAIN_KEYS = _keys(
    "happy poor old fine early full strong open large cold silent late easy perfect eager light quick rich sweet tired",
    "sister room father house wish brother letter party aunt lady door town voice uncle dinner table face dance ball "
    "tea",
)
EVAL_KEYS = _keys(
    "young kind pretty ready new true small round pleasant wrong high fair quiet warm strange useful safe fresh plain "
    "deep",
    "mother friend heart morning evening word visit walk hand carriage head cousin smile child journey money window "
    "fire book garden",
)

_HEADER = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_WORD = "The"
"""Stands for the haystack while the wording is encoded, and before each sentence of it."""
_SENTENCES_PER_CALL = 4096
_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_QUESTION = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text? "
    "The special magic {kind} for {key} mentioned in the provided text is"
)

# A sentence ends at . ! or ? (and a closing quote) before a space and a capital, unless after a title or an initial.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\b[A-Z]\.)(\"?) (?=\"?[A-Z])")


@dataclass(frozen=True, kw_only=True)
class NeedleSample:
    variant: str
    prompt_ids: list[int]
    answer_ids: list[int]
    answer: str
    depth: float
    """The position of the needle in the haystack: 0 at its start, near 1 at its end."""


class Prose:
    """Text to hide needles in: the sentences of `documents` as one sequence of token ids, in memory.

    Raises:
        ValueError: there are no documents.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]):
        sentences = (f" {sentence}" for document in documents for sentence in _sentences(document))
        ids: list[np.ndarray] = []
        while some := list(islice(sentences, _SENTENCES_PER_CALL)):
            encoded = encode_parts(tokenizer, ((_WORD, sentence) for sentence in some))
            ids += [np.asarray(sentence, dtype=np.int64) for _, sentence in encoded]
        if not ids:
            raise ValueError("no prose: there are no documents")
        self._ids = np.concatenate(ids)
        self._starts = np.cumsum([0, *(len(sentence) for sentence in ids[:-1])])

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self._ids)

    def span(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A random haystack that begins with a sentence.

        Returns:
            [length] int64 consecutive ids, and the positions in them at which sentences start (the first is 0).

        Raises:
            ValueError: the prose is shorter than `length`.
        """
        choices = np.searchsorted(self._starts, len(self) - length, side="right")
        if choices == 0:
            raise ValueError(f"a haystack of {length} tokens is longer than the whole prose ({len(self)} tokens)")
        begin = self._starts[rng.integers(choices)]
        first, last = np.searchsorted(self._starts, [begin, begin + length])
        return self._ids[begin : begin + length], self._starts[first:last] - begin


def build_needle(
    tokenizer: PreTrainedTokenizerFast,
    variant: str,
    length: int,
    rng: np.random.Generator,
    keys: Sequence[str],
    prose: Prose,
) -> NeedleSample:
    """One test of `variant`. Prompt and answer together are exactly `length` tokens.

    niah_single_1 hides a 7-digit number in noise (one line, repeated), niah_single_2 a number in prose, niah_single_3 a
    UUID in prose. The needle is before a random sentence (in noise: line) of the haystack. The haystack is cut to fit.

    Raises:
        ValueError: the variant is unknown, `length` leaves no room for a haystack, or the prose is shorter than it.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    noise = variant == "niah_single_1"
    kind = "uuid" if variant == "niah_single_3" else "number"
    value = str(uuid.UUID(bytes=rng.bytes(16), version=4)) if kind == "uuid" else str(rng.integers(10**6, 10**7))
    fields = {"kind": kind, "key": keys[rng.integers(len(keys))], "value": value}
    needle = _NEEDLE.format(**fields)
    wording = [
        _HEADER.format(**fields),
        _NOISE if noise else f" {_WORD}",
        f"{needle}\n" if noise else f" {needle}",
        _WORD if noise else f" {_WORD}",
        _QUESTION.format(**fields),
        f" {value}",
    ]
    [(header_ids, line_ids, needle_ids, _, question_ids, answer_ids)] = encode_parts(tokenizer, [wording])
    taken = len(header_ids) + len(needle_ids) + len(question_ids) + len(answer_ids)
    room = length - taken
    if room < 1:
        raise ValueError(f"a {variant} sample of {length} tokens has no room for a haystack: {taken} are taken")

    if noise:
        haystack, starts = np.resize(np.asarray(line_ids), room), np.arange(0, room, len(line_ids))
    else:
        haystack, starts = prose.span(room, rng)
    at = int(starts[rng.integers(len(starts))])
    haystack_ids = haystack.tolist()
    return NeedleSample(
        variant=variant,
        prompt_ids=[*header_ids, *haystack_ids[:at], *needle_ids, *haystack_ids[at:], *question_ids],
        answer_ids=answer_ids,
        answer=value,
        depth=at / room,
    )


def template_texts(copies: int) -> Iterator[str]:
    """The wording without keys and values: a tokenizer trained on it encodes needle tests in few tokens."""
    for _ in range(copies):
        for kind in ("number", "uuid"):
            fields = {"kind": kind, "key": "", "value": ""}
            yield _HEADER.format(**fields) + _NOISE + _NEEDLE.format(**fields) + _QUESTION.format(**fields)


def _sentences(text: str) -> list[str]:
    """RULER's haystack is one line: each run of white space becomes one space."""
    return _SENTENCE_END.sub("\\1\n", " ".join(text.split())).split("\n")
