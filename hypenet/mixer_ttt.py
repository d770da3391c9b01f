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
from .linear_attention import each_document, widen
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
    """Token by token: the reference, for one token, and for rows whose mini-batches begin at different tokens.

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
        seen = (torch.einsum("bihd,bjhd->bhij", q_i, k_i) + 1).tril()
        z = torch.einsum("bihd,bhde->bihe", q_i, w - sum_w) + (b - sum_b)[:, None]
        outputs.append(q_i + ln(z - torch.einsum("bhij,bjhd->bihd", seen, step)))

        sum_w = sum_w + torch.einsum("bjhd,bjhe->bhde", k_i, step)
        sum_b = sum_b + step.sum(1)
        if (end - first) % mini_batch == 0:
            w, b = w - sum_w, b - sum_b
            sum_w, sum_b = torch.zeros_like(w), torch.zeros_like(b)
    return torch.cat(outputs, dim=1).to(q.dtype), (w, b, sum_w, sum_b, (filled + length) % mini_batch)


def _aligned(tokens: Tensor | None, state: Learned) -> bool:
    """Whether the mini-batches of all rows begin at the same tokens, and there is no padding."""
    filled = state[-1]
    return (tokens is None or bool(tokens.all())) and bool((filled == filled[0]).all())


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
    """By the fastest form: token by token for one token or uneven rows, else by mini-batch.

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
    if q.shape[1] > 1 and _aligned(tokens, state):
        output, final = ttt_chunked(q, k, v, eta, ln, mini_batch, state)
    else:
        output, final = ttt_recurrence(q, k, v, eta, tokens, ln, mini_batch, state)
    return output, final if keep_state else None


@mixer("ttt")
class TTTLinear(RNNMixer):
    """TTT-Linear. `W_0` and `b_0` are the first W and b, `ln_*` are LN's, `lr_proj` and `lr_bias` are W_lr and b_lr."""

    Options = TTTOptions
    options: TTTOptions
    recurrence = staticmethod(ttt)
    split = "heads"

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.W_0 = nn.Parameter(0.02 * torch.randn(self.heads, self.head_dim, self.head_dim))
        self.b_0 = nn.Parameter(torch.zeros(self.heads, self.head_dim))
        self.ln_weight = nn.Parameter(torch.ones(self.heads, self.head_dim))
        self.ln_bias = nn.Parameter(torch.zeros(self.heads, self.head_dim))
        self.lr_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.lr_bias = nn.Parameter(torch.zeros(self.heads))

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
