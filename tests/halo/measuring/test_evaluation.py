"""The measures against plain references: greedy generation, one row at a time, all logits at once."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from halo.data.needle import NeedleSample
from halo.errors import UserError
from halo.measuring import evaluation
from halo.measuring.evaluation import (
    Question,
    build_questions,
    continuation_accuracy,
    log_likelihoods,
    loss_at_length,
    needle_recall,
)
from hypenet.modeling_hypenet import HypeNetForCausalLM
from hypenet.transfer import hybrid_config

VOCABULARY = 61


@pytest.fixture(scope="module", params=["transformer", "hybrid"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.5,  # large, so that the argmax depends on the context
        eos_token_id=None,
        pad_token_id=0,
    )
    if request.param == "hybrid":
        return HypeNetForCausalLM(hybrid_config(config, [1], logits_scaling=10)).eval()
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture
def three_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Each value is a rank of three, whose figures stay its own share: their sum is what all would return."""
    monkeypatch.setattr(evaluation, "world_size", lambda: 3)
    monkeypatch.setattr(evaluation, "all_sum", lambda tensor: tensor)

    def ranks() -> Iterator[int]:
        for number in range(3):
            monkeypatch.setattr(evaluation, "rank", lambda number=number: number)
            yield number

    return ranks()


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)[
        0, len(prompt) :
    ].tolist()


def needle(prompt: list[int], answer: list[int]) -> NeedleSample:
    return NeedleSample(variant="niah_single_1", prompt_ids=prompt, answer_ids=answer, answer="", depth=0.5)


@pytest.fixture(scope="module")
def needles(model: PreTrainedModel) -> tuple[list[NeedleSample], int]:
    """Samples of several lengths, a third of them as the model would answer, and how many those are."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(18):
        prompt = rng.integers(VOCABULARY, size=rng.integers(8, 14)).tolist()
        answer = greedy(model, prompt, count=int(rng.integers(2, 6)))
        wrong = [None, 0, len(answer) - 1][number % 3]
        if wrong is not None:
            answer[wrong] = (answer[wrong] + 1) % VOCABULARY
        samples.append(needle(prompt, answer))
    return samples, 6


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Contexts and choices of unequal lengths."""
    rng = np.random.default_rng(1)

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(VOCABULARY, size=rng.integers(low, high)).tolist()

    return [
        Question(context=tokens(5, 9), choices=[tokens(2, 6) for _ in range(4)], answer=int(rng.integers(4)))
        for _ in range(22)
    ]


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_recall_equals_greedy_generation(model: PreTrainedModel, needles, batch: int) -> None:
    samples, right = needles
    assert sum(greedy(model, s.prompt_ids, len(s.answer_ids)) == s.answer_ids for s in samples) == right
    assert needle_recall(model, samples, batch=batch) == right / len(samples)


def test_recall_asks_for_the_answers_logits_only(model: PreTrainedModel, needles) -> None:
    rows = []
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: rows.append(logits.shape[1]))
    samples = [needle([1] * 30, [2] * 5), needle([1] * 31, [2] * 4)]
    needle_recall(model, samples, batch=2)
    hook.remove()
    assert rows == [5]


def pairs_of(questions: list[Question]) -> list[tuple[list[int], list[int]]]:
    return [(question.context, choice) for question in questions for choice in question.choices]


@pytest.mark.parametrize("batch_tokens", [1, 40, 1000])
def test_likelihoods_equal_one_row_at_a_time(
    model: PreTrainedModel, questions: list[Question], monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(evaluation, "TOKENS_PER_CHUNK", 7)
    pairs = pairs_of(questions)
    pairs += [(question.context, greedy(model, question.context, count=3)) for question in questions[:5]]
    likely, written = log_likelihoods(model, pairs, batch_tokens=batch_tokens)
    for (context, continuation), value, greedily in zip(pairs, likely.tolist(), written.tolist(), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].double()
        each = logits.log_softmax(-1)[range(len(continuation)), continuation]
        assert value == pytest.approx(each.sum().item(), rel=1e-5)
        assert greedily == (logits.argmax(-1).tolist() == continuation)
    assert written[-5:].all()
    assert not written[:-5].all()


def test_accuracy_is_by_likelihood_per_token(model: PreTrainedModel, questions: list[Question]) -> None:
    likely, _ = log_likelihoods(model, pairs_of(questions), batch_tokens=100)
    means = iter(value / len(choice) for (_, choice), value in zip(pairs_of(questions), likely.tolist(), strict=True))
    right = sum(int(np.argmax([next(means) for _ in q.choices])) == q.answer for q in questions)
    assert 0 < right < len(questions)
    assert continuation_accuracy(model, questions, batch_tokens=60) == right / len(questions)


def test_accuracy_prefers_what_the_model_would_write(model: PreTrainedModel, questions: list[Question]) -> None:
    written = []
    for number, question in enumerate(questions):
        choices = [*question.choices]
        choices[number % 4] = greedy(model, question.context, count=6)
        written.append(Question(context=question.context, choices=choices, answer=number % 4))
    assert continuation_accuracy(model, written, batch_tokens=100) > 0.8


@pytest.mark.parametrize("batch", [1, 2])
def test_loss_equals_all_logits_at_once(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(evaluation, "TOKENS_PER_CHUNK", 7)
    rows = []
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: rows.append(logits.shape[0]))
    samples = torch.randint(VOCABULARY, (5, 20), generator=torch.Generator().manual_seed(0))
    loss = loss_at_length(model, samples, batch=batch)
    hook.remove()
    with torch.no_grad():
        logits = model(samples).logits[:, :-1].double()
    assert loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()).item(), rel=1e-6)
    assert max(rows) == 7


def test_ranks_share_the_work(model: PreTrainedModel, needles, questions: list[Question], three_ranks) -> None:
    samples, right = needles
    documents = torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    parts = [
        (
            needle_recall(model, samples, batch=2),
            log_likelihoods(model, pairs_of(questions), batch_tokens=60)[0],
            loss_at_length(model, documents),
        )
        for _ in three_ranks
    ]
    recall, likely, loss = (sum(column) for column in zip(*parts, strict=True))
    assert recall == pytest.approx(right / len(samples))
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(evaluation, "world_size", lambda: 1)
        alone.setattr(evaluation, "rank", lambda: 0)
        whole = log_likelihoods(model, pairs_of(questions), batch_tokens=60)[0]
        torch.testing.assert_close(likely, whole)
        assert not any(torch.equal(part, whole) for _, part, _ in parts)
        assert loss == pytest.approx(loss_at_length(model, documents), rel=1e-6)


def test_progress_counts_the_samples_of_all_ranks(
    model: PreTrainedModel, needles, questions: list[Question], three_ranks
) -> None:
    samples, _ = needles
    for _ in three_ranks:
        done: list[int] = []
        needle_recall(model, samples, batch=4, progress=done.append)
        assert done == [12, 6]
        done.clear()
        log_likelihoods(model, pairs_of(questions), batch_tokens=40, progress=done.append)
        assert sum(done) == len(pairs_of(questions))
        assert len(done) > 2


def test_half_precision_and_training_mode(needles, questions: list[Question]) -> None:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        attention_dropout=0.5,
    )
    model = Qwen3ForCausalLM(config).bfloat16().train()
    samples = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    assert loss_at_length(model, samples) == loss_at_length(model, samples)
    assert 0 <= needle_recall(model, needles[0], batch=4) <= 1
    assert 0 <= continuation_accuracy(model, questions, batch_tokens=100) <= 1
    assert model.training


def test_nothing_to_evaluate(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no samples"):
        needle_recall(model, [], batch=1)
    with pytest.raises(ValueError, match="no samples"):
        log_likelihoods(model, [], batch_tokens=1)
    for empty in (([1], []), ([], [1])):
        with pytest.raises(ValueError, match="an empty context or continuation"):
            log_likelihoods(model, [([1], [2]), empty], batch_tokens=1)


def test_questions_continue_their_own_document() -> None:
    # Document d holds the ids 1000 d, 1000 d + 1, ...: an id tells its document and place.
    documents = [1000 * number + np.arange(length, dtype=np.uint16) for number, length in enumerate([40, 200, 11, 90])]
    questions = build_questions(documents, count=100, context=12, continuation=5, seed=3)
    assert len(questions) == 100
    for question in questions:
        true = question.choices[question.answer]
        assert question.context + true == list(range(question.context[0], question.context[0] + 17))
        sources = [choice[0] // 1000 for choice in question.choices]
        assert sources.count(question.context[0] // 1000) == 1
        assert 2 not in sources, "a document shorter than a question"
        for choice in question.choices:
            assert choice == list(range(choice[0], choice[0] + 5))
    assert {question.answer for question in questions} == {0, 1, 2, 3}
    assert questions == build_questions(documents, count=100, context=12, continuation=5, seed=3)
    assert questions != build_questions(documents, count=100, context=12, continuation=5, seed=4)


def test_questions_need_two_documents() -> None:
    with pytest.raises(UserError, match="at least 17 tokens, and there are 1: use a larger corpus"):
        build_questions([np.arange(17), np.arange(16)], count=1, context=12, continuation=5, seed=0)
