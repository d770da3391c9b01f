"""The Triton kernel behind halo.losses.linear_kl: one program a row of logits, which it reads twice.

First sweep: maxima, sums of exponentials, the expectation of t - s and of t under the teacher, and both argmaxes, each
lane of the block keeping its own running values. That is all that the loss and the metrics need. Second sweep: the
gradient of the student's logits. `hypenet/loss_kernels.py` says how a row is cut, and why it is read twice.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hypenet.fused import run_program
from hypenet.loss_kernels import grown, row_block


@triton.jit
def _kl_rows(  # type: ignore[no-untyped-def]
    student,
    teacher,
    gradient,
    weights,
    labels,
    label_weights,
    kl_out,
    entropy_out,
    agreement_out,
    nll_out,
    words,
    student_stride,
    teacher_stride,
    gradient_stride,
    temperature,
    cross_entropy,
    HAS_LABELS: tl.constexpr,
    TRAINS_LABELS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    LOG2_E: tl.constexpr = 1.4426950408889634
    cooling = 1.0 / temperature
    cooling_2 = cooling * LOG2_E  # for exponentials of base 2

    # A very small number in place of minus infinity: the difference of two is still a number.
    m_s = tl.full((BLOCK,), -1e30, tl.float32)
    m_t = tl.full((BLOCK,), -1e30, tl.float32)
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    sum_1 = tl.zeros((BLOCK,), tl.float32)  # the student's at temperature 1
    t_mean = tl.zeros((BLOCK,), tl.float32)
    gap_mean = tl.zeros((BLOCK,), tl.float32)
    best_s = tl.zeros((BLOCK,), tl.int32)
    best_t = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, words, BLOCK):
        v = begin + lanes
        s = tl.load(student + v, mask=v < words, other=-1e30)
        t = tl.load(teacher + v, mask=v < words, other=-1e30)
        best_s = tl.where(s > m_s, v, best_s)
        best_t = tl.where(t > m_t, v, best_t)
        if TEMPERED:
            _, fade_1, e_1 = grown(m_s, s, LOG2_E)
            sum_1 = sum_1 * fade_1 + e_1
        m_s, fade_s, e_s = grown(m_s, s, cooling_2)
        m_t, fade_t, e_t = grown(m_t, t, cooling_2)
        sum_s = sum_s * fade_s + e_s
        sum_t = sum_t * fade_t + e_t
        t_mean = t_mean * fade_t + e_t * t
        gap_mean = gap_mean * fade_t + tl.where(v < words, e_t * (t - s), 0.0)

    top_s, top_t = tl.max(m_s), tl.max(m_t)
    share_t = tl.exp((m_t - top_t) * cooling)
    log_z_s = tl.log(tl.sum(sum_s * tl.exp((m_s - top_s) * cooling))) + top_s * cooling
    z_t = tl.sum(sum_t * share_t)
    log_z_t = tl.log(z_t) + top_t * cooling
    log_z_1 = log_z_s
    if TEMPERED:
        log_z_1 = tl.log(tl.sum(sum_1 * tl.exp(m_s - top_s))) + top_s
    first_s = tl.min(tl.where(m_s == top_s, best_s, words))
    first_t = tl.min(tl.where(m_t == top_t, best_t, words))
    tl.store(kl_out + row, cooling * tl.sum(gap_mean * share_t) / z_t - log_z_t + log_z_s)
    tl.store(entropy_out + row, log_z_t - cooling * tl.sum(t_mean * share_t) / z_t)
    tl.store(agreement_out + row, (first_s == first_t).to(tl.float32))
    if HAS_LABELS:
        label = tl.maximum(tl.load(labels + row), 0).to(tl.int32)
        # A label that is no word of both heads shows, in place of reading what lies behind the row.
        tl.store(nll_out + row, log_z_1 - tl.load(student + label, mask=label < words, other=float("nan")))

    if HAS_GRADIENT:
        gradient += row * gradient_stride
        to_kl = temperature * tl.load(weights + row)
        if TRAINS_LABELS:
            to_nll = cross_entropy * tl.load(label_weights + row)
        # Backwards: what was read last is still in the cache, and what is done with makes room.
        for back in range(0, words, BLOCK):
            v = (words - 1 - back) // BLOCK * BLOCK + lanes
            s = tl.load(student + v, mask=v < words, other=-1e30, eviction_policy="evict_first")
            t = tl.load(teacher + v, mask=v < words, other=-1e30, eviction_policy="evict_first")
            d = to_kl * (tl.exp(s * cooling - log_z_s) - tl.exp(t * cooling - log_z_t))
            if TRAINS_LABELS:
                d += to_nll * (tl.exp(s - log_z_1) - tl.where(v == label, 1.0, 0.0))
            tl.store(gradient + v, d.to(gradient.dtype.element_ty), mask=v < words, eviction_policy="evict_first")


def kl_rows_triton(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    label_weights: Tensor | None,
    terms: Any,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`halo.losses.linear_kl.kl_rows` in one kernel."""
    rows, words = student.shape
    labels, label_weights = (None if x is None else x.contiguous() for x in (labels, label_weights))
    kl, entropy, agreement, nll = torch.zeros(4, rows, device=student.device).unbind()
    run_program(
        _kl_rows,
        rows,
        *(student, teacher, gradient, weights, labels, label_weights, kl, entropy, agreement, nll, words),
        *(student.stride(0), teacher.stride(0), 0 if gradient is None else gradient.stride(0)),
        *(terms.temperature, terms.cross_entropy),
        HAS_LABELS=labels is not None,
        TRAINS_LABELS=labels is not None and terms.cross_entropy != 0,
        HAS_GRADIENT=gradient is not None,
        TEMPERED=terms.temperature != 1.0,
        **row_block(words),
    )
    return kl, entropy, agreement, nll
