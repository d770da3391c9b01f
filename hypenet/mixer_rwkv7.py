"""RWKV-7 (Peng et al., 2025), as far as a layer alone can have it (paper Tables 11 and 15).

    log w_t  = -exp(-1/2) sigmoid(tanh(x_t W_1) W_2 + w_0)        rate_t = sigmoid(x_t A_1 A_2 + a_0)
    kappa_t  = k_t * k_k, to length one                            k~_t = k_t * (1 + (rate_t - 1) * k_a)
    S_t      = (diag(w_t) - (kappa_t * rate_t)^T kappa_t) S_(t-1) + k~_t^T v_t
    o_t      = r_t S_t + (r_t (r_k * k~_t)^T) v_t
    z_t      = sigmoid(x_t G_1) G_2                                the output gate

r is q in the other mixers. Everything is per channel, except lengths and products, which are per head. RoPE (HyPE) is
applied to r and k before all this. RWKV-7 norms each head of r_t S_t and then adds the second term of o_t; here the sum
goes through the one output norm that all RNN layers have. As there, nothing is divided by sqrt(D).

Two parts are left out. The value residual mixes in the first layer's values, and the token shift the token before. But
HALO's stage 1 trains each layer alone, to compute from x_t what the teacher's attention computes.

w_0, a_0, k_k, k_a and r_k begin as in RWKV-7's own implementation.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import State
from .configuration_hypenet import HypeNetConfig
from .delta_rule import RWKV7_STRONGEST_DECAY, rwkv7
from .linear_attention import widen
from .mixers import mixer
from .rnn_mixer import RNNMixer, RNNOptions


@dataclass(frozen=True, kw_only=True)
class RWKV7Options(RNNOptions):
    """RNNOptions, without QK-norm (Table 15), and:

    Attributes:
        decay_low_rank_dim: the width between W_1 and W_2, and between A_1 and A_2 (Table 15).
        gate_low_rank_dim: the width between G_1 and G_2 (Table 15).
    """

    qk_norm: str | None = None
    decay_low_rank_dim: int = 160
    gate_low_rank_dim: int = 160


@mixer("rwkv7")
class RWKV7(RNNMixer):
    """RWKV-7. `w_proj` holds W_1 and W_2, `a_proj` A_1 and A_2, `z_proj` G_1 and G_2; the rest have their names."""

    Options = RWKV7Options
    options: RWKV7Options
    w_0: nn.Parameter
    a_0: nn.Parameter
    k_k: nn.Parameter
    k_a: nn.Parameter
    r_k: nn.Parameter
    recurrence = staticmethod(rwkv7)
    split = "heads"

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        options, width = self.options, self.heads * self.head_dim
        self.w_proj = _low_rank(config.hidden_size, options.decay_low_rank_dim, width, nn.Tanh())
        self.a_proj = _low_rank(config.hidden_size, options.decay_low_rank_dim, width, nn.Identity())
        if options.use_output_gate:
            self.z_proj = _low_rank(config.hidden_size, options.gate_low_rank_dim, width, nn.Sigmoid())

    def first_values(self) -> dict[str, Tensor]:
        depth, width = self.layer_idx / max(self.config.num_hidden_layers - 1, 1), self.heads * self.head_dim
        across = torch.linspace(-0.5, 0.5, width, dtype=torch.float32)
        in_head = torch.linspace(-1, 1, self.head_dim, dtype=torch.float32).repeat(self.heads)
        bend = in_head * in_head.abs()
        return {
            "w_0": 6 * (across + 0.5) ** (1 + depth**0.3) - 5.5 + 2.5 * bend,
            "a_0": 0.4 * across + 0.3 * bend - 0.19,
            "k_k": 0.71 - 0.1 * across,
            "k_a": torch.full([width], 1.02),
            "r_k": torch.full([width], -0.04),
        }

    def multiply_adds(self, seq_len: int) -> float:
        """D^2 each to read kappa S, to write that along kappa * rate, to write k~^T v, and to read r S."""
        return 4 * self.head_dim**2

    def norm_and_gate(self, output: Tensor, z: Tensor | None) -> Tensor:
        """The sigmoid of this gate is between its two factors, not behind them."""
        if self.o_norm is not None:
            output = self.o_norm(output)
        return output if z is None else output * z

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor, tokens: Tensor | None, **carried: Any
    ) -> tuple[Tensor, State | None]:
        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, self.head_dim))

        log_decay = RWKV7_STRONGEST_DECAY * torch.sigmoid(widen(self.w_proj(hidden_states)) + self.w_0)
        rate = by_head(torch.sigmoid(self.a_proj(hidden_states) + self.a_0))
        kappa = F.normalize(widen(k * by_head(self.k_k)), dim=-1, eps=1e-6).to(k.dtype)  # zero where k is, at padding
        written = k * (1 + (rate - 1) * by_head(self.k_a))
        bonus = (q * by_head(self.r_k) * written).sum(-1, keepdim=True) * v
        k, a, b = (x.to(q.dtype) for x in (written, -kappa, kappa * rate))
        output, state = self.recurrence(q, k, v, a, b, by_head(log_decay), scale=1.0, **carried)
        return output + bonus.to(q.dtype), state


def _low_rank(inputs: int, rank: int, outputs: int, between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), between, nn.Linear(rank, outputs, bias=False))
