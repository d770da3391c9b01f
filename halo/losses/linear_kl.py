"""Stage 2's loss (Eq. 10): KL(teacher || student) from final hidden states and heads, never from [tokens, vocabulary].

The heads are applied to a chunk of tokens at a time. While the chunk's fp32 logits exist, its loss, its metrics and the
gradient of its logits are computed, and from that the gradients of the student's hidden states and head; backward only
scales them. So each of the four matrix products is done once, and nothing is recomputed.

    logits s = h W^T, t = h' W'^T;  q = softmax(s / T), p = softmax(t / T)
    loss = sum_i w_i T^2 sum_v p (log p - log q) + c u_i (-log softmax(s)_label)
    d loss / d s_i = w_i T (q - p) + c u_i (softmax(s) - onehot(label))

The weights w and u make means over the tokens, and over those that have a label.

A teacher may supply its logits in other forms than h' and W' (halo/teacher/logits.py). If it supplies the K largest,
all other words count as one, of probability p_r and q_r: the KL of these K + 1 is a lower bound of that of all words,
and equal to it if K is V. The gradient moves the others together, in the student's proportions:

    sum_K p (log p - log q) + p_r (log p_r - log q_r);   in place of q - p, outside of K:  q - p_r q / q_r

Shapes: N tokens, V words, D student width, E teacher width, K words whose logits are the largest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halo.teacher.logits import TeacherLogits, TopKLogits
from hypenet.kernels import has_triton
from hypenet.losses import LinearGradients, chunk_sizes, exact_logits, handed_out

LIVE_NUMBERS, LIVE_TOP_K = 2, 5
"""The float32 numbers that live for each logit, by the form in which the teacher supplies its own."""


@dataclass(frozen=True)
class Terms:
    """The loss of a row of logits.

    Attributes:
        temperature: T; the loss is multiplied by T^2, so that the gradient's size does not depend on T.
        cross_entropy: c, the weight of the cross entropy with the labels.
    """

    temperature: float
    cross_entropy: float


RowTerms = tuple[Tensor, Tensor, Tensor, Tensor]
"""KL, the teacher's entropy, top-1 agreement and the student's cross entropy of each row, [C] float32 each."""


def linear_kl(
    hidden: Tensor,
    head: Tensor,
    teacher: TeacherLogits,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    label_count: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(teacher || student), mean over tokens, and its metrics.

    Logits are accumulated and kept in float32, also from operands in half precision. If the heads are padded to
    different sizes, only the words that both have count.

    Args:
        hidden: [N, D] the student's final hidden states.
        head: [V, D] the student's output head.
        teacher: its logits of these N tokens, in one of their forms.
        labels: [N] int64 next tokens, negative where there is none. Needed if `cross_entropy` is not zero.
        temperature: T, for both distributions.
        cross_entropy: the weight of the cross entropy in the loss.
        label_count: the divisor of the sum over labels. None: the number of labels.
        chunk: tokens whose logits live at a time. None: as many as fit `CHUNK_BYTES`.

    Returns:
        (loss, metrics): a scalar, and detached means over tokens: `kl` (nats, at temperature T; of K + 1 words if the
        teacher supplies the K largest logits), `teacher_entropy` (nats, at T), `agreement` (share of equal argmax) and,
        with labels, the student's `cross_entropy` (nats).

    Raises:
        ValueError: a cross entropy without labels, a temperature that is not positive, or the k largest logits of
            another temperature or of words that the student lacks.
    """
    if cross_entropy and labels is None:
        raise ValueError("linear_kl needs labels for a cross entropy: give them, or leave cross_entropy at 0.")
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}.")
    if isinstance(teacher, TopKLogits) and (teacher.temperature != temperature or teacher.words > len(head)):
        raise ValueError(
            f"the teacher's largest logits are those of {teacher.words} words at temperature {teacher.temperature}, "
            f"but the student has {len(head)} words, and the temperature is {temperature}."
        )
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weights = _mean_weights(hidden.new_ones(len(hidden), dtype=dtype))
    label_weights = None
    if labels is not None:
        labelled = (labels >= 0).to(dtype)
        label_weights = _mean_weights(labelled) if label_count is None else labelled / label_count
    terms = Terms(temperature, cross_entropy)
    loss, kl, entropy, agreement, nll = _LinearKL.apply(
        hidden, head, teacher, weights, labels, label_weights, terms, chunk
    )
    metrics = {"kl": kl, "teacher_entropy": entropy, "agreement": agreement}
    return loss, metrics if labels is None else metrics | {"cross_entropy": nll}


def _mean_weights(counted: Tensor) -> Tensor:
    return counted / counted.sum().clamp(min=1)


def kl_rows(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    label_weights: Tensor | None,
    terms: Terms,
    gradient: Tensor | None,
) -> RowTerms:
    """One chunk in plain torch: the terms of each row; the gradient of the student's logits is written to `gradient`.

    Args:
        student, teacher: [C, V] float32 logits; their values are lost.
        weights: [C] float32, each row's weight in the mean.
        labels, label_weights: [C] int64 and float32, or None. A row without a label has a negative one and weight 0.
        gradient: [C, V] in the precision of the matrix products, or None: not wanted.
    """
    temperature = terms.temperature
    agreement = (student.argmax(-1) == teacher.argmax(-1)).to(student.dtype)
    log_q, log_p = F.log_softmax(student / temperature, dim=-1), F.log_softmax(teacher / temperature, dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    kl = (p * (log_p - log_q)).sum(-1)
    to_logits = weights[:, None] * temperature * (log_q.exp() - p)
    nll = _cross_entropy(student, labels, label_weights, terms, to_logits)
    if gradient is not None:
        gradient.copy_(to_logits)
    return kl, entropy, agreement, nll


def kl_rows_top_k(
    student: Tensor,
    teacher: TopKLogits,
    weights: Tensor,
    labels: Tensor | None,
    label_weights: Tensor | None,
    terms: Terms,
    gradient: Tensor | None,
) -> RowTerms:
    """`kl_rows` for the k largest logits of each row.

    The other words may have nearly all of the probability, or next to nothing. So their share is computed as 1 minus
    the rest if it is large, else as a log-sum-exp of these words (`_log_rest`).
    """
    temperature, indices = terms.temperature, teacher.indices.long()
    values = teacher.values.to(student.dtype) / temperature
    agreement = (student.argmax(-1) == indices[:, 0]).to(student.dtype)
    scaled = student / temperature
    log_z, log_z_p = scaled.logsumexp(-1, keepdim=True), values.logsumexp(-1, keepdim=True)
    log_rest_p = teacher.log_rest.to(student.dtype)[:, None]
    log_z_p = torch.logaddexp(log_z_p, log_rest_p)
    log_p, log_q = values - log_z_p, scaled.gather(-1, indices) - log_z
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    to_logits = (scaled - log_z).exp_()
    if teacher.values.shape[1] < teacher.words:
        others = scaled.scatter_(-1, indices, -torch.inf)
        log_rest = others.logsumexp(-1, keepdim=True)
        log_p_rest, log_q_rest = _log_rest(log_p, log_rest_p - log_z_p), _log_rest(log_q, log_rest - log_z)
        p_rest, more = log_p_rest.exp(), log_p_rest - log_q_rest
        kl += (p_rest * more)[:, 0]
        # q_j - p_rest q_j / q_rest, as q_j (1 - p_rest / q_rest) where the two are close.
        close = more < 1
        to_logits *= torch.where(close, -torch.expm1(more), 1.0)
        to_logits -= others.sub_(log_rest).exp_().mul_(torch.where(close, 0.0, p_rest))
    to_logits.scatter_(-1, indices, log_q.exp() - log_p.exp())
    to_logits *= weights[:, None] * temperature
    nll = _cross_entropy(student, labels, label_weights, terms, to_logits)
    if gradient is not None:
        gradient.copy_(to_logits)
    return kl, teacher.entropy.to(student.dtype), agreement, nll


def _log_rest(log_share: Tensor, log_rest: Tensor) -> Tensor:
    """log(1 - the sum of shares), [C, 1], from their logarithms [C, k]; if they are most of 1, from `log_rest`."""
    share = log_share.exp().sum(-1, keepdim=True)
    return torch.where(share < 0.5, torch.log1p(-share.clamp(max=0.5)), log_rest)


def _cross_entropy(
    student: Tensor, labels: Tensor | None, label_weights: Tensor | None, terms: Terms, to_logits: Tensor
) -> Tensor:
    """The cross entropy of each row, [C]; its gradient is added to `to_logits`, [C, V]."""
    if labels is None or label_weights is None:
        return student.new_zeros(len(student))
    label = labels.clamp(min=0)[:, None]
    log_q = F.log_softmax(student, dim=-1)
    if terms.cross_entropy:
        scale = terms.cross_entropy * label_weights[:, None]
        to_logits += (log_q.exp() * scale).scatter_add_(-1, label, -scale)
    return -log_q.gather(-1, label)[:, 0]


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher: TeacherLogits,
        weights: Tensor,
        labels: Tensor | None,
        label_weights: Tensor | None,
        terms: Terms,
        chunk: int | None,
    ) -> tuple[Tensor, ...]:
        words = min(len(head), teacher.words)
        live = LIVE_TOP_K if isinstance(teacher, TopKLogits) else LIVE_NUMBERS
        part, whole = chunk_sizes(hidden, words, chunk, live=live)
        gradients = LinearGradients(hidden, head, words, whole, ctx.needs_input_grad)
        student = hidden.new_empty(part, words, dtype=torch.promote_types(hidden.dtype, torch.float32))
        rows_of = _rows_of(teacher, student)

        terms_of_rows: list[RowTerms] = []
        for rows, to_logits in gradients.parts(part):
            a, b = rows.start, rows.stop
            s = exact_logits(hidden[rows], head[:words], student[: b - a])
            w, label, u = (None if x is None else x[rows] for x in (weights, labels, label_weights))
            terms_of_rows.append(rows_of(a, b, s, w, label, u, terms, to_logits))

        kl, entropy, agreement, nll = (torch.cat(column) for column in zip(*terms_of_rows, strict=True))
        kl, entropy, agreement = weights @ kl, weights @ entropy, weights @ agreement
        nll = nll.new_zeros(()) if label_weights is None else label_weights @ nll
        del rows_of, student, s, to_logits  # room for the head's gradient in its own precision
        ctx.gradients = gradients.finished()
        loss = terms.temperature**2 * kl
        if terms.cross_entropy:
            loss = loss + terms.cross_entropy * nll
        metrics = (kl, entropy, agreement, nll)
        ctx.mark_non_differentiable(*metrics)
        return loss, *metrics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *handed_out(ctx, grad), *(None,) * 6


def _rows_of(teacher: TeacherLogits, student: Tensor) -> Callable[..., RowTerms]:
    """The function of a chunk's terms: of its begin and end, then of `kl_rows`'s arguments but the teacher's logits.

    It is the kernel on a GPU, plain torch elsewhere, and always plain torch for the k largest logits.

    Args:
        student: [C, V], a buffer with the shape and dtype of the teacher's logits.
    """
    if isinstance(teacher, TopKLogits):
        return lambda a, b, s, *rest: kl_rows_top_k(s, teacher.part(a, b), *rest)
    kernel: Callable[..., RowTerms] = kl_rows
    if student.is_cuda and has_triton():
        from halo.losses.linear_kl_kernel import kl_rows_triton  # Triton does not exist on every machine

        kernel = kl_rows_triton
    buffer = torch.empty_like(student)
    return lambda a, b, s, *rest: kernel(s, teacher.rows(a, b, buffer[: b - a]), *rest)
