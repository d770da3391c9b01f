"""What is measured of a model: needle recall, continuation accuracy, and loss at a length.

Every function takes a plain transformers causal language model (a teacher, a teacher with replaced mixers, a hybrid; of
any dtype), whole on each rank. The work is split over the ranks, and every rank returns the figure of all.

Rows of unequal length are padded on the right. No position of a causal model sees what follows it: no mask is needed.

`progress`, where given, is called as the work advances with the number of samples that all ranks have just finished:
`tqdm.update` on rank 0, say. Nothing to evaluate is a ValueError.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from halo.distributed import all_sum, rank, world_size
from halo.errors import UserError
from halo.models import unpadded
from halo.needle import NeedleSample

Progress = Callable[[int], object]

CHOICES = 4
NO_TARGET = -100
TOKENS_PER_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class Question:
    """A context and the spans that might continue it, as token ids."""

    context: list[int]
    choices: list[list[int]]
    answer: int
    """Which of `choices` is the true continuation."""


def needle_recall(
    model: PreTrainedModel, samples: Sequence[NeedleSample], *, batch: int, progress: Progress | None = None
) -> float:
    """The share of samples whose whole answer is the model's greedy continuation of the prompt (exact match).

    One forward over prompt and answer decides: where every answer token is the argmax given the true tokens before it,
    greedy generation writes the same. Samples of about one length belong in one call.
    """
    by_length = sorted(samples, key=lambda sample: len(sample.prompt_ids) + len(sample.answer_ids))
    hits = 0
    with _evaluating(model):
        for rows in _shares(len(by_length), batch, progress):
            share = by_length[rows]
            logits, targets = _answer_logits(
                model, [sample.prompt_ids for sample in share], [sample.answer_ids for sample in share]
            )
            right = (logits.argmax(-1) == targets) | (targets == NO_TARGET)
            hits += int(right.all(dim=1).sum())
    return _total(hits) / len(samples)


def continuation_accuracy(
    model: PreTrainedModel, questions: Sequence[Question], *, batch: int = 8, progress: Progress | None = None
) -> float:
    """The share of questions whose true choice has the highest log-likelihood per token given the context.

    This is HellaSwag's form without its data set. All choices of a question are scored in one forward, and `batch`
    questions at a time.
    """
    hits = 0
    with _evaluating(model):
        for rows in _shares(len(questions), batch, progress):
            share = questions[rows]
            logits, targets = _answer_logits(
                model,
                [question.context for question in share for _ in question.choices],
                [choice for question in share for choice in question.choices],
            )
            # [B x choices, A]; 0 where there is no target.
            losses = F.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_TARGET, reduction="none"
            ).view_as(targets)
            mean = losses.sum(dim=1) / (targets != NO_TARGET).sum(dim=1)
            for question, scores in zip(share, mean.split([len(q.choices) for q in share]), strict=True):
                hits += int(scores.argmin()) == question.answer
    return _total(hits) / len(questions)


def loss_at_length(
    model: PreTrainedModel, samples: Tensor, *, batch: int = 1, progress: Progress | None = None
) -> float:
    """The mean next-token loss (nats, fp32) over `samples` [N, T] (int64), every token but the first of each.

    The head is applied to chunks of hidden states, so that logits of [T, vocabulary] never exist at once.
    """
    head = model.get_output_embeddings()
    total = 0.0
    with _evaluating(model):
        for rows in _shares(len(samples), batch, progress):
            ids = samples[rows].to(model.device)
            hidden = model.base_model(**unpadded(model, ids)).last_hidden_state[:, :-1]
            chunks = zip(
                hidden.flatten(0, 1).split(TOKENS_PER_CHUNK), ids[:, 1:].flatten().split(TOKENS_PER_CHUNK), strict=True
            )
            for states, targets in chunks:
                total += F.cross_entropy(head(states).float(), targets, reduction="sum").item()
    return _total(total) / samples[:, 1:].numel()


def build_questions(
    documents: Sequence[np.ndarray], *, count: int, context: int, continuation: int, seed: int
) -> list[Question]:
    """`count` questions from the token ids of held-out documents.

    Context and true continuation are neighbours in one document; the other three choices are spans of the same length
    out of other documents. All starts are drawn uniformly over tokens.

    Raises:
        UserError: fewer than two documents are as long as context and continuation together.
    """
    span = context + continuation
    documents = [document for document in documents if len(document) >= span]
    if len(documents) < 2:
        raise UserError(
            f"continuation questions need two held-out documents of at least {span} tokens, and there are "
            f"{len(documents)}: give a larger corpus, or a shorter context or continuation"
        )
    rng = np.random.default_rng(seed)
    weights = np.array([len(document) for document in documents], dtype=float)
    questions = []
    for _ in range(count):
        own = rng.choice(len(documents), p=weights / weights.sum())
        start = rng.integers(len(documents[own]) - span + 1)
        known, true = np.split(documents[own][start : start + span], [context])
        elsewhere = np.where(np.arange(len(documents)) == own, 0, weights)
        choices = []
        for other in rng.choice(len(documents), size=CHOICES - 1, p=elsewhere / elsewhere.sum()):
            first = rng.integers(len(documents[other]) - continuation + 1)
            choices.append(documents[other][first : first + continuation].tolist())
        answer = int(rng.integers(CHOICES))
        choices.insert(answer, true.tolist())
        questions.append(Question(context=known.tolist(), choices=choices, answer=answer))
    return questions


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without autograd; the mode that the model was in comes back at the end."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _shares(count: int, batch: int, progress: Progress | None) -> Iterator[slice]:
    """This rank's batches of `count` samples: one of every `world_size()` batches that follow each other."""
    if count == 0:
        raise ValueError("there is nothing to evaluate: no samples were given")
    stride = batch * world_size()
    for first in range(0, count, stride):
        mine = first + batch * rank()
        if mine < count:
            yield slice(mine, mine + batch)
        if progress is not None:
            progress(min(stride, count - first))


def _total(value: float) -> float:
    """The sum of `value` over all ranks."""
    return all_sum(torch.tensor(value, dtype=torch.float64)).item()


def _answer_logits(
    model: PreTrainedModel, contexts: Sequence[list[int]], answers: Sequence[list[int]]
) -> tuple[Tensor, Tensor]:
    """One forward over contexts with their answers, and what it predicts for the answers.

    Returns:
        Logits [B, A, vocabulary] in the model's dtype, and the tokens that they are to predict, [B, A], `NO_TARGET`
        where a row has no answer token. A reaches from the first position of any answer to the last.
    """
    length = max(len(context) + len(answer) for context, answer in zip(contexts, answers, strict=True))
    ids = torch.zeros(len(contexts), length, dtype=torch.long)
    targets = torch.full_like(ids, NO_TARGET)
    for row, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
        end = len(context) + len(answer)
        ids[row, :end] = torch.tensor(context + answer)
        targets[row, len(context) : end] = torch.tensor(answer)
    keep = length - min(map(len, contexts))
    logits = model(**unpadded(model, ids[:, :-1].to(model.device)), logits_to_keep=keep).logits
    return logits, targets[:, -keep:].to(model.device)
