"""Needle tests say what RULER's say, are exactly as long as asked, and share no key between training and evaluation."""

import hashlib
import json
import re
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from halo.data.corpus import read_documents
from halo.data.needle import EVAL_KEYS, TRAIN_KEYS, VARIANTS, Prose, build_needle, template_texts
from halo.measuring.evaluation import needle_recall
from halo.models.tokenizer import load_tokenizer, train_tokenizer
from tests.halo.tokenizer_kinds import KINDS

LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture(scope="module")
def prose(tokenizer: PreTrainedTokenizerFast, corpus: Path) -> Prose:
    return Prose(tokenizer, read_documents(corpus / "persuasion.txt", "held_out"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [256, 777, 4096])
def test_exact_length(tokenizer: PreTrainedTokenizerFast, prose: Prose, variant: str, length: int) -> None:
    rng = np.random.default_rng(length)
    for _ in range(20):
        sample = build_needle(tokenizer, variant, length, rng, TRAIN_KEYS + EVAL_KEYS, prose)
        assert len(sample.prompt_ids) + len(sample.answer_ids) == length


@pytest.mark.parametrize("variant", VARIANTS)
def test_wording(tokenizer: PreTrainedTokenizerFast, prose: Prose, variant: str) -> None:
    rng = np.random.default_rng(1)
    kind = "uuid" if variant == "niah_single_3" else "number"
    value = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}" if kind == "uuid" else "[1-9][0-9]{6}"
    for _ in range(20):
        sample = build_needle(tokenizer, variant, 600, rng, EVAL_KEYS, prose)
        assert re.fullmatch(value, sample.answer)
        assert tokenizer.decode(sample.answer_ids) == f" {sample.answer}"
        prompt = tokenizer.decode(sample.prompt_ids)
        head = (
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n"
        )
        assert prompt.startswith(head)
        asked = re.search(
            rf"\nWhat is the special magic {kind} for (\S+) mentioned in the provided text\? "
            rf"The special magic {kind} for (\S+) mentioned in the provided text is$",
            prompt,
        )
        assert asked and asked[1] == asked[2] and asked[1] in EVAL_KEYS
        needle = f"One of the special magic {kind}s for {asked[1]} is: {sample.answer}."
        assert prompt.count(needle) == prompt.count(sample.answer) == 1
        before, after = prompt[len(head) : asked.start()].split(needle)
        if variant == "niah_single_1":
            assert before == f"{LINE}\n" * before.count("\n")
            assert after.startswith("\n") and f"{LINE}\n".startswith(after.split("\n")[-1])
        else:
            assert "\n" not in before + after
            assert not before.strip() or before.endswith((". ", "! ", "? ", '" '))
            assert after.startswith(" ")


def test_depths_cover_the_haystack(tokenizer: PreTrainedTokenizerFast, prose: Prose) -> None:
    rng = np.random.default_rng(2)
    for variant in VARIANTS:
        depths = [build_needle(tokenizer, variant, 1024, rng, TRAIN_KEYS, prose).depth for _ in range(200)]
        counts, _ = np.histogram(depths, bins=4, range=(0, 1))
        assert counts.min() > 25


def test_the_same_seed_gives_the_same_samples(tokenizer: PreTrainedTokenizerFast, prose: Prose) -> None:
    first, second, third = (
        build_needle(tokenizer, "niah_single_3", 300, np.random.default_rng(seed), EVAL_KEYS, prose)
        for seed in (5, 5, 6)
    )
    assert first == second != third


def test_keys_of_training_and_evaluation_share_no_word(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [{word for key in keys for word in key.split("-")} for keys in (TRAIN_KEYS, EVAL_KEYS)]
    assert not words[0] & words[1]
    lengths = []
    for keys in (TRAIN_KEYS, EVAL_KEYS):
        assert len(set(keys)) == 400
        lengths.append(np.mean([len(ids) for ids in tokenizer([f" {key}" for key in keys])["input_ids"]]))
    assert abs(lengths[0] - lengths[1]) < 0.5  # neither list is easier to copy


def test_any_tokenizer(corpus: Path) -> None:
    documents = list(read_documents(corpus / "persuasion.txt", "train"))
    coarse = train_tokenizer(documents[:3], 300)
    prose = Prose(coarse, documents[3:6])
    sample = build_needle(coarse, "niah_single_2", 1000, np.random.default_rng(0), EVAL_KEYS, prose)
    assert len(sample.prompt_ids) + len(sample.answer_ids) == 1000
    assert coarse.decode(sample.answer_ids) == f" {sample.answer}"


def test_what_cannot_be_built(tokenizer: PreTrainedTokenizerFast, prose: Prose) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no room for a haystack"):
        build_needle(tokenizer, "niah_single_3", 64, rng, TRAIN_KEYS, prose)
    with pytest.raises(ValueError, match="longer than the whole prose"):
        build_needle(tokenizer, "niah_single_2", len(prose) + 500, rng, TRAIN_KEYS, prose)
    with pytest.raises(ValueError, match="'niah_multi' is not one of"):
        build_needle(tokenizer, "niah_multi", 256, rng, TRAIN_KEYS, prose)
    with pytest.raises(ValueError, match="no prose"):
        Prose(tokenizer, [])


class Copier(torch.nn.Module):
    """Continues each row with what follows the last "is:" in it: it recalls a needle that has no other after it."""

    device, config = torch.device("cpu"), None

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, **_: object) -> CausalLMOutput:
        logits = torch.zeros(len(input_ids), len(logits_to_keep), len(self.tokenizer))
        for row, ids in enumerate(input_ids):
            texts = [self.tokenizer.decode(ids[at : at + 2]) for at in range(len(ids) - 1)]
            last = max(at for at, text in enumerate(texts) if text.replace(" ", "").endswith("is:"))
            copied = ids[last + 2 : last + 2 + len(logits_to_keep)]
            logits[row, torch.arange(len(copied)), copied] = 1
        return CausalLMOutput(logits=logits)


@pytest.fixture(scope="module", params=KINDS)
def other(request: pytest.FixtureRequest, corpus: Path) -> tuple[PreTrainedTokenizerFast, Prose]:
    """A tokenizer of another kind, and prose in it."""
    documents = list(read_documents(corpus / "persuasion.txt", "train"))[:6]
    made = KINDS[request.param](chain(documents, template_texts(200)))
    return made, Prose(made, documents[:2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_perfect_copy_is_the_answer_under_any_tokenizer(
    other: tuple[PreTrainedTokenizerFast, Prose], variant: str
) -> None:
    made, prose = other
    rng = np.random.default_rng(3)
    samples = [build_needle(made, variant, 700, rng, EVAL_KEYS, prose) for _ in range(8)]
    assert needle_recall(Copier(made), samples, batch=1) == 1
    for sample in samples:
        assert len(sample.prompt_ids) + len(sample.answer_ids) == 700
        # As running text has it: one space before the answer, whatever the tokenizer puts before a text.
        assert made.decode(sample.prompt_ids + sample.answer_ids).endswith(f"provided text is {sample.answer}")
        assert "afterwards.\n" in made.decode(sample.prompt_ids) or "\n" not in made.decode(made("a\nb")["input_ids"])


def test_samples_of_byte_level_tokenizers_stay_the_same(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus.parent / "teacher")
    prose = Prose(tokenizer, read_documents(corpus / "persuasion.txt", "held_out"))
    digest = hashlib.sha256()
    for variant in VARIANTS:
        for length in (600, 1000, 1777):
            rng = np.random.default_rng(length)
            for _ in range(10):
                sample = build_needle(tokenizer, variant, length, rng, TRAIN_KEYS + EVAL_KEYS, prose)
                made = [sample.prompt_ids, sample.answer_ids, sample.answer, sample.depth]
                digest.update(json.dumps(made).encode())
    assert digest.hexdigest() == "69c4bae28c2cb85e96588613672ba40c7b5585adc82651c5479aca12cb0f2fc7"
