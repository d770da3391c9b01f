"""The paper's measurements of a model: needle recall, common-sense reasoning (CSR), and loss at long context.

    needle_recall          exact-match recall, needle in a haystack: R in Eq. 8, and the tables of recall over length
    continuation_accuracy  CSR on held-out text: C in Eq. 8
    log_likelihoods        CSR by LM-Evaluation-Harness (Appendix E.2) is computed from them
    loss_at_length         mean next-token loss: chooses the base a of the logits scaling (Eq. 11)

Every function takes a transformers causal language model (a teacher, a teacher with replaced mixers, a hybrid) of any
dtype, whole on each rank. The samples are split over the ranks, or over groups of ranks that share each sequence
(`share_sequences`), and every rank returns the result over all samples. No samples: ValueError.

Rows of unequal length are padded on the right. Without a mask: no position of a causal model sees what follows it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from halo.data.needle import NeedleSample
from halo.distributed import all_sum, rank, world_size
from halo.errors import UserError
from halo.models.loading import unpadded
from halo.parallel.prepare import prepare_model
from halo.parallel.sequence import SequenceGroup
from halo.teacher.batch import next_tokens
from hypenet.losses import IGNORE
from hypenet.modeling_hypenet import HypeNetPreTrainedModel

ProgressCallback = Callable[[int], object]
"""Called during a measurement, on every rank, with the number of samples that all ranks together have just finished."""
Pair = tuple[list[int], list[int]]
"""A context and a possible continuation, as token ids."""
NOT_SHARED = SequenceGroup()

CHOICES = 4
TOKENS_PER_CHUNK = 1024
"""Tokens whose logits exist at a time."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A context and its possible continuations, as token ids."""

    context: list[int]
    choices: list[list[int]]
    answer: int
    """Which of `choices` is the true continuation."""


def share_sequences(model: PreTrainedModel, group: SequenceGroup) -> None:
    """Split each sequence over the ranks of `group`. `model`, a hybrid or a teacher, then works without a cache."""
    teacher = not isinstance(model, HypeNetPreTrainedModel)
    prepare_model(model, fused=teacher and group.degree > 1, sequence=group, tiled=True)


def needle_recall(
    model: PreTrainedModel,
    samples: Sequence[NeedleSample],
    *,
    batch: int,
    group: SequenceGroup = NOT_SHARED,
    alike: bool = False,
    progress: ProgressCallback | None = None,
) -> float:
    """Exact-match recall: the share of samples in [0, 1] whose prompt the model continues greedily with the answer.

    One forward over prompt and answer decides this: if every answer token is the argmax given the true tokens before
    it, greedy generation writes the answer. Samples of one call should have similar lengths.

    Args:
        batch: samples in one forward.
        group: as passed to `share_sequences` for this model.
        alike: whether every rank runs as many forwards, as a model must whose weights are spread over the ranks.
    """
    by_length = sorted(samples, key=lambda sample: len(sample.prompt_ids) + len(sample.answer_ids))
    hits = 0
    with _evaluating(model):
        for rows in _shares(len(by_length), batch, progress, group, alike):
            counted = by_length[rows]
            share = counted or by_length[-1:]
            logits, targets = _answer_logits(
                model, [sample.prompt_ids for sample in share], [sample.answer_ids for sample in share], group
            )
            right = (logits.argmax(-1) == targets) | (targets == IGNORE)
            hits += int(group.all_of(right.all(dim=1))[: len(counted)].sum())
    return _total(hits) / group.degree / len(samples)


def log_likelihoods(
    model: PreTrainedModel, pairs: Sequence[Pair], *, batch_tokens: int, progress: ProgressCallback | None = None
) -> tuple[Tensor, Tensor]:
    """The log-likelihood of each continuation given its context, and whether greedy generation writes it.

    The head is applied only where a token of a continuation is predicted, TOKENS_PER_CHUNK positions at a time.

    Args:
        pairs: contexts and their continuations; the same on every rank.
        batch_tokens: the most tokens in one forward, padding included. A longer pair has a forward of its own.

    Returns:
        [N] float64, on the CPU: the sum of the log-probabilities of a continuation's tokens (nats, from fp32 logits).
        [N] bool: whether each of its tokens is the most likely one, given the true tokens before it.

    Raises:
        ValueError: there are no pairs, or a context or continuation is empty.
    """
    if not all(context and continuation for context, continuation in pairs):
        raise ValueError("an empty context or continuation has no likelihood")
    batches = _batches([len(context) + len(continuation) for context, continuation in pairs], batch_tokens)
    head = copy.deepcopy(model.get_output_embeddings()).float()  # half precision would make unequal choices equal
    found = torch.zeros(len(pairs), 2, dtype=torch.float64, device=model.device)  # log-likelihood, tokens missed
    with _evaluating(model):
        for mine in _shares(len(batches), 1, None if progress is None else _counting(progress, batches)):
            for batch in batches[mine]:
                ids, targets = _padded([pairs[i][0] for i in batch], [pairs[i][1] for i in batch])
                targets = targets.to(model.device)
                asked = targets != IGNORE
                hidden = model.base_model(**unpadded(model, ids.to(model.device))).last_hidden_state
                rows = torch.tensor(batch, device=model.device)[asked.nonzero()[:, 0]]
                for states, true, row in zip(
                    *(x.split(TOKENS_PER_CHUNK) for x in (hidden[asked], targets[asked], rows)), strict=True
                ):
                    logits = head(states.float())
                    likely = -F.cross_entropy(logits, true, reduction="none")
                    found.index_add_(0, row, torch.stack([likely, logits.argmax(-1) != true], dim=1).double())
    total = all_sum(found).cpu()
    return total[:, 0], total[:, 1] == 0


def continuation_accuracy(
    model: PreTrainedModel,
    questions: Sequence[Question],
    *,
    batch_tokens: int,
    progress: ProgressCallback | None = None,
) -> float:
    """CSR on held-out text: the share of questions in [0, 1] whose true choice has the best log-likelihood per token.

    The form of HellaSwag, without its data set. For `progress`, each choice is a sample.
    """
    pairs = [(question.context, choice) for question in questions for choice in question.choices]
    likely, _ = log_likelihoods(model, pairs, batch_tokens=batch_tokens, progress=progress)
    per_token = likely / torch.tensor([len(choice) for _, choice in pairs])
    scores = per_token.split([len(question.choices) for question in questions])
    hits = sum(int(each.argmax()) == question.answer for question, each in zip(questions, scores, strict=True))
    return hits / len(questions)


def loss_at_length(
    model: PreTrainedModel,
    samples: Tensor,
    *,
    batch: int = 1,
    group: SequenceGroup = NOT_SHARED,
    progress: ProgressCallback | None = None,
) -> float:
    """The mean next-token loss (nats, fp32) over all tokens of `samples` except the first of each sample.

    The head is applied to chunks of hidden states: logits [T, vocabulary] never exist at once.

    Args:
        samples: [N, T] int64.
        batch: samples in one forward.
        group: as passed to `share_sequences` for this model; its number of ranks divides T.
    """
    head = model.get_output_embeddings()
    total = 0.0
    with _evaluating(model):
        for rows in _shares(len(samples), batch, progress, group):
            ids = samples[rows].to(model.device)
            labels = group.begin(ids).of_chunk(next_tokens(ids)).flatten()
            hidden = model.base_model(**group.arguments(model, ids)).last_hidden_state.flatten(0, 1)
            for states, targets in zip(hidden.split(TOKENS_PER_CHUNK), labels.split(TOKENS_PER_CHUNK), strict=True):
                total += F.cross_entropy(head(states).float(), targets, ignore_index=IGNORE, reduction="sum").item()
    return _total(total) / samples[:, 1:].numel()


def build_questions(
    documents: Sequence[np.ndarray], *, count: int, context: int, continuation: int, seed: int
) -> list[Question]:
    """`count` questions from the token ids of held-out documents.

    The true continuation follows the context in one document. The other three choices are spans of the same length
    from other documents. Every token is equally likely to be a start.

    Args:
        context, continuation: their lengths in tokens.

    Raises:
        UserError: fewer than two documents are as long as context and continuation together.
    """
    span = context + continuation
    documents = [document for document in documents if len(document) >= span]
    if len(documents) < 2:
        raise UserError(
            f"continuation questions need two held-out documents of at least {span} tokens, and there are "
            f"{len(documents)}: use a larger corpus, or a shorter context or continuation"
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
    """Evaluation mode without autograd, within the block. Then the model's mode is as before.

    Not `inference_mode`: weights that ZeRO-3 gathers in it could not be trained.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _shares(
    count: int, batch: int, progress: ProgressCallback | None, group: SequenceGroup = NOT_SHARED, alike: bool = False
) -> Iterator[slice]:
    """This rank's batches of `count` samples, or its group's: the ranks, or groups, take turns.

    Args:
        alike: whether all have as many; the last may then be empty.
    """
    if count == 0:
        raise ValueError("there is nothing to evaluate: no samples were given")
    stride = batch * (world_size() // group.degree)
    for first in range(0, count, stride):
        mine = first + batch * (rank() // group.degree)
        if mine < count or alike:
            yield slice(mine, mine + batch)
        if progress is not None:
            progress(min(stride, count - first))


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """The samples, longest first, in batches of at most `batch_tokens`, padding included."""
    order = sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
    batches, first = [], 0
    while first < len(order):
        rows = max(1, batch_tokens // lengths[order[first]])
        batches.append(order[first : first + rows])
        first += rows
    return batches


def _counting(progress: ProgressCallback, batches: Sequence[Sequence[object]]) -> ProgressCallback:
    """`progress`, called with numbers of batches: it counts the samples in them, in the order of the batches."""
    sizes = iter([len(batch) for batch in batches])
    return lambda finished: progress(sum(islice(sizes, finished)))


def _total(value: float) -> float:
    """The sum of `value` over all ranks."""
    return all_sum(torch.tensor(value, dtype=torch.float64)).item()


def _padded(contexts: Sequence[list[int]], answers: Sequence[list[int]], multiple_of: int = 1) -> tuple[Tensor, Tensor]:
    """Contexts with their answers as one batch, without the last token of each row.

    Returns:
        Ids and targets, [B, T] int64, T a multiple of `multiple_of`. Only the answers' tokens are targets; elsewhere
        IGNORE.
    """
    longest = max(len(context) + len(answer) for context, answer in zip(contexts, answers, strict=True)) - 1
    ids = torch.zeros(len(contexts), -(-longest // multiple_of) * multiple_of, dtype=torch.long)
    targets = torch.full_like(ids, IGNORE)
    for row, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
        tokens, begin = context + answer, len(context) - 1
        ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        targets[row, begin : begin + len(answer)] = torch.tensor(answer)
    return ids, targets


def _answer_logits(
    model: PreTrainedModel, contexts: Sequence[list[int]], answers: Sequence[list[int]], group: SequenceGroup
) -> tuple[Tensor, Tensor]:
    """One forward over contexts with their answers, and its predictions of the answers.

    Only for the A positions of this rank's chunk at which some row predicts a token of an answer.

    Returns:
        Logits [B, A, vocabulary] in the model's dtype, and the targets [B, A]; IGNORE where a row has none.
    """
    ids, targets = _padded(contexts, answers, group.degree)
    targets = group.begin(ids).of_chunk(targets)
    asked = (targets != IGNORE).any(0).nonzero().flatten()
    arguments = group.arguments(model, ids.to(model.device))
    logits = model(**arguments, logits_to_keep=asked.to(model.device)).logits
    return logits, targets[:, asked].to(model.device)
