"""TTT-Linear (Sun et al., 2025): the state is a linear model, and each token is a step of its training (Table 10).

    f(x)    = x + LN(x W + b)                    the inner model, one per head
    loss_t  = |f(k_t) - v_t|^2 / 2               it learns values from keys
    W_t     = W - sum_s eta_s k_s^T grad_s       over the tokens s <= t of t's mini-batch
    b_t     = b - sum_s eta_s grad_s
    o_t     = q_t + LN(q_t W_t + b_t)

W and b are those at the beginning of the mini-batch, and grad_s is the gradient of loss_s with respect to k_s W + b
there: so all tokens of a mini-batch learn in parallel. eta_t = base_lr sigmoid(x_t W_lr + b_lr) / D, one per head. LN
has its own weights for each head. Queries are not divided by sqrt(D), as the keys that train the inner model are not.

The first W is drawn from N(0, 0.02^2), the first b is zero. Both are trained; so is LN, whose weights begin at one and
biases at zero.

fla's kernel is not used: it gives the keys of a mini-batch the learning rate of the query, and has another residual.

Shapes: B batch, T tokens, H heads, D their width. q, k, v and the output are [B, T, H, D], eta is [B, T, H]. All is
computed in float32, or float64 where the input is.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import State
from .configuration_hypenet import HypeNetConfig
from .kernels import unvalued
from .linear_attention import each_document, in_chunks, is_open, over_chunks, widen
from .mixers import mixer
from .rnn_mixer import RNNMixer, RNNOptions

Learned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""W [B, H, D, D] and b [B, H, D] of the mini-batch, the sums to subtract from them, and its number of tokens, [B]."""


@dataclass(frozen=True, kw_only=True)
class TTTOptions(RNNOptions):
    """RNNOptions, with queries and keys of length one, and:

    Attributes:
        mini_batch_size: the number of tokens that learn from the same W and b.
        base_lr: a factor of all learning rates.
    """

    qk_norm: str | None = "l2"
    mini_batch_size: int = 16
    base_lr: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be at least 1, not {self.mini_batch_size}.")


@dataclass(frozen=True)
class InnerNorm:
    """LN of the inner model, over D, with weights and biases [H, D]."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, z: Tensor) -> Tensor:
        """LN(z), [..., H, D]."""
        return F.layer_norm(z, z.shape[-1:], eps=self.eps) * self.weight + self.bias

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """The gradient of |LN(z) - target|^2 / 2 with respect to z, [..., H, D]."""
        centred = z - z.mean(-1, keepdim=True)
        inverse_std = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        normed = centred * inverse_std
        slope = self.weight * (self.weight * normed + self.bias - target)
        along = normed * (slope * normed).mean(-1, keepdim=True)
        return inverse_std * (slope - slope.mean(-1, keepdim=True) - along)


def ttt_recurrence(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, tokens: Tensor | None, ln: InnerNorm, mini_batch: int, state: Learned
) -> tuple[Tensor, Learned]:
    """Token by token: the reference, and the form that decodes one token.

    Args:
        tokens: [B, T], false at padding, from which nothing is learnt, or None: no padding.

    Returns:
        The output in q's dtype, and the state after the last token.
    """
    w, b, sum_w, sum_b, filled = state
    if tokens is None:
        tokens = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    eta = eta * tokens[..., None]
    outputs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = (widen(x[:, t]) for x in (q, k, v))
        step = eta[:, t, :, None] * ln.gradient(torch.einsum("bhd,bhde->bhe", k_t, w) + b, v_t - k_t)
        sum_w = sum_w + k_t[..., :, None] * step[..., None, :]
        sum_b = sum_b + step
        outputs.append(q_t + ln(torch.einsum("bhd,bhde->bhe", q_t, w - sum_w) + b - sum_b))

        filled = filled + tokens[:, t]
        full = (filled == mini_batch)[:, None, None]
        w, b = torch.where(full[..., None], w - sum_w, w), torch.where(full, b - sum_b, b)
        sum_w, sum_b = sum_w.masked_fill(full[..., None], 0), sum_b.masked_fill(full, 0)
        filled = filled % mini_batch
    return torch.stack(outputs, dim=1).to(q.dtype), (w, b, sum_w, sum_b, filled)


def ttt_chunked(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, ln: InnerNorm, mini_batch: int, state: Learned
) -> tuple[Tensor, Learned]:
    """A mini-batch at a time, without its W_t: q_t W_t + b_t = q_t W + b - sum_s (q_t . k_s + 1) eta_s grad_s.

    That is the paper's dual form. The mini-batches of all rows begin at the same tokens, and there is no padding.

    Returns:
        The output in q's dtype, and the state after the last token.
    """
    w, b, sum_w, sum_b, filled = state
    length, first = q.shape[1], mini_batch - int(filled[0])
    outputs = []
    for begin, end in pairwise([0, *range(first, length, mini_batch), length]):
        q_i, k_i, v_i = (widen(x[:, begin:end]) for x in (q, k, v))
        step = eta[:, begin:end, :, None] * ln.gradient(torch.einsum("bihd,bhde->bihe", k_i, w) + b[:, None], v_i - k_i)
        output, new_w, new_b = _mini_batch(q_i, k_i, step, ln, w - sum_w, b - sum_b)
        outputs.append(output)
        sum_w, sum_b = sum_w + new_w, sum_b + new_b
        if (end - first) % mini_batch == 0:
            w, b = w - sum_w, b - sum_b
            sum_w, sum_b = torch.zeros_like(w), torch.zeros_like(b)
    return torch.cat(outputs, dim=1).to(q.dtype), (w, b, sum_w, sum_b, (filled + length) % mini_batch)


def ttt_in_slots(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, tokens: Tensor | None, ln: InnerNorm, mini_batch: int, state: Learned
) -> tuple[Tensor, Learned]:
    """As `ttt_chunked`, wherever a row's mini-batches begin and whatever is padding: no value decides what runs.

    The tokens of a row are put into the slots of N mini-batches, behind as many empty ones as the first mini-batch had
    tokens before. Nothing is learnt from an empty slot.

    Args:
        tokens: [B, T], false at padding, or None: no padding.

    Returns:
        The output in q's dtype, of no meaning at padding, and the state after the last token.
    """
    w, b, sum_w, sum_b, filled = state
    batch, length = q.shape[:2]
    chunks = (length + 2 * mini_batch - 2) // mini_batch + is_open(length)
    if tokens is None:
        tokens = torch.ones(batch, length, dtype=torch.bool, device=q.device)
    filled = filled.to(q.device)
    slot = filled[:, None] + tokens.long().cumsum(1) - 1  # [B, T]
    beyond = torch.where(tokens, slot, chunks * mini_batch)

    def by_slot(x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [B, N, mini_batch, H, ...], seen as [B, 1, N, ...] where chunks are taken."""
        slots = x.new_zeros(batch, chunks * mini_batch + 1, *x.shape[2:])
        slots = slots.index_put((torch.arange(batch, device=x.device)[:, None], beyond), x)
        return in_chunks(slots[:, :-1], mini_batch)[:, None]

    total = filled + tokens.sum(1)
    ends = mini_batch * torch.arange(1, chunks + 1, device=q.device)
    full = (ends <= total[:, None])[:, None]  # [B, 1, N]

    def step(state: tuple[Tensor, ...], *chunk: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor]]:
        w, b, sum_w, sum_b = state
        q_i, k_i, v_i, eta_i, full = (x[:, 0] for x in chunk)
        gradient = ln.gradient(torch.einsum("bihd,bhde->bihe", k_i, w) + b[:, None], v_i - k_i)
        output, new_w, new_b = _mini_batch(q_i, k_i, eta_i[..., None] * gradient, ln, w - sum_w, b - sum_b)
        sum_w, sum_b, end = sum_w + new_w, sum_b + new_b, full[:, None, None]
        w, b = torch.where(end[..., None], w - sum_w, w), torch.where(end, b - sum_b, b)
        return (w, b, sum_w.masked_fill(end[..., None], 0), sum_b.masked_fill(end, 0)), (output[:, None],)

    inputs = (*(by_slot(widen(x)) for x in (q, k, v)), by_slot(eta), full)
    learned, (outputs,) = over_chunks(step, (w, b, sum_w, sum_b), *inputs)
    index = slot.clamp(min=0)[..., None, None].expand_as(q)
    return outputs[:, 0].flatten(1, 2).gather(1, index).to(q.dtype), (*learned, total % mini_batch)


def _mini_batch(
    q: Tensor, k: Tensor, step: Tensor, ln: InnerNorm, w: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of one mini-batch, [B, C, H, D], and what its `step`s, eta_s grad_s, add to the sums.

    Args:
        w, b: what the first of its tokens reads, [B, H, D, D] and [B, H, D].
    """
    seen = (torch.einsum("bihd,bjhd->bhij", q, k) + 1).tril()
    z = torch.einsum("bihd,bhde->bihe", q, w) + b[:, None]
    output = q + ln(z - torch.einsum("bhij,bjhd->bihd", seen, step))
    return output, torch.einsum("bjhd,bjhe->bhde", k, step), step.sum(1)


def _aligned(tokens: Tensor | None, state: Learned) -> bool:
    """Whether the mini-batches of all rows are known to begin at the same tokens, and there is no padding."""
    filled = state[-1]
    return not unvalued(filled) and (tokens is None or bool(tokens.all())) and bool((filled == filled[0]).all())


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    mini_batch: int,
    state: Learned,
    keep_state: bool = False,
    tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Learned | None]:
    """By the fastest form: one step for one token, else by mini-batch.

    Args:
        weight, bias: [H, D], LN's.
        eps: LN's.
        state: the state to continue, or the one before the first token, of each document.
        keep_state: whether to return the state after the last token.
        tokens: [B, T], false at padding, or None: no padding.
        cu_seqlens: [documents + 1], where each of the documents packed in a batch of one begins, and the end.

    Returns:
        The output in q's dtype, and the state, or None unless `keep_state`.
    """
    if cu_seqlens is not None:
        inputs, options = (q, k, v, eta, weight, bias), {"eps": eps, "mini_batch": mini_batch}
        return each_document(ttt, inputs, cu_seqlens, state=state, keep_state=keep_state, **options)
    ln = InnerNorm(weight, bias, eps)
    if q.shape[1] == 1:
        output, final = ttt_recurrence(q, k, v, eta, tokens, ln, mini_batch, state)
    elif _aligned(tokens, state):
        output, final = ttt_chunked(q, k, v, eta, ln, mini_batch, state)
    else:
        output, final = ttt_in_slots(q, k, v, eta, tokens, ln, mini_batch, state)
    return output, final if keep_state else None


@mixer("ttt")
class TTTLinear(RNNMixer):
    """TTT-Linear. `W_0` and `b_0` are the first W and b, `ln_*` are LN's, `lr_proj` and `lr_bias` are W_lr and b_lr."""

    Options = TTTOptions
    options: TTTOptions
    W_0: nn.Parameter
    b_0: nn.Parameter
    ln_weight: nn.Parameter
    ln_bias: nn.Parameter
    lr_bias: nn.Parameter
    recurrence = staticmethod(ttt)
    split = "heads"

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.lr_proj = nn.Linear(config.hidden_size, self.heads, bias=False)

    def first_values(self) -> dict[str, Tensor]:
        by_head = (self.heads, self.head_dim)
        return {
            "W_0": 0.02 * torch.randn(*by_head, self.head_dim, dtype=torch.float32),
            "b_0": torch.zeros(by_head),
            "ln_weight": torch.ones(by_head),
            "ln_bias": torch.zeros(by_head),
            "lr_bias": torch.zeros(self.heads),
        }

    def multiply_adds(self, seq_len: int) -> float:
        """D^2 each to read k W, to write the step, and to read q W."""
        return 3 * self.head_dim**2

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor, tokens: Tensor | None, **carried: Any
    ) -> tuple[Tensor, State | None]:
        rate = self.options.base_lr / self.head_dim
        eta = rate * torch.sigmoid(widen(self.lr_proj(hidden_states)) + self.lr_bias)
        mini_batch, eps = self.options.mini_batch_size, self.config.rms_norm_eps
        ln = (self.ln_weight, self.ln_bias)
        return self.recurrence(q, k, v, eta, *ln, eps=eps, mini_batch=mini_batch, tokens=tokens, **carried)

    def first_state(self, q: Tensor, batch: int) -> Learned:
        """W_0 and b_0, no sums, and mini-batches without a token."""
        w, b = (widen(x).expand(batch, *x.shape).to(widen(q).dtype) for x in (self.W_0, self.b_0))
        device = "cpu" if q.is_meta else q.device  # how full a mini-batch is decides what runs, so it needs a value
        return w, b, torch.zeros_like(w), torch.zeros_like(b), torch.zeros(batch, dtype=torch.long, device=device)
