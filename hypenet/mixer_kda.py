"""Kimi Delta Attention (Kimi et al., 2025): DeltaNet with a decay per token and channel (paper Table 10).

    beta_t = sigmoid(x_t W_b)        alpha_t = exp(-A_h softplus(x_t W_1 W_2 + b_a))        beta one per head
    S_t = (I - beta_t k_t^T k_t) diag(alpha_t) S_(t-1) + beta_t k_t^T v_t        o_t = q_t S_t / sqrt(D)

A and b_a begin as in KDA's own implementation: A is uniform in [1, 16], softplus(b_a) log-uniform in [0.001, 0.1].

The paper's authors could not convert Qwen3 to KDA: in stage 2 the norm of the gradient became infinite after a few
steps, at smaller learning rates too (App. G.2).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_hypenet import HypeNetConfig
from .linear_attention import widen
from .mixer_deltanet import DeltaNet, DeltaNetOptions
from .mixer_gdn import initial_dt_bias
from .mixers import mixer


@dataclass(frozen=True, kw_only=True)
class KDAOptions(DeltaNetOptions):
    """DeltaNetOptions, and:

    Attributes:
        gate_low_rank_dim: the width between W_1 and W_2. None: as wide as a head.
    """

    gate_low_rank_dim: int | None = None


@mixer("kda")
class KimiDeltaAttention(DeltaNet):
    """KDA. `f_a_proj` is W_1, `f_b_proj` is W_2, `dt_bias` is b_a, `A_log` is log(A)."""

    Options = KDAOptions
    options: KDAOptions
    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        rank = self.options.gate_low_rank_dim or self.head_dim
        self.f_a_proj = nn.Linear(config.hidden_size, rank, bias=False)
        self.f_b_proj = nn.Linear(rank, self.heads * self.head_dim, bias=False)

    def first_values(self) -> dict[str, Tensor]:
        rates = torch.empty(self.heads, dtype=torch.float32).uniform_(1, 16)
        return {"A_log": rates.log(), "dt_bias": initial_dt_bias(self.heads, self.head_dim)}

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        """log(alpha_t), [B, T, H, D]."""
        logits = widen(self.f_b_proj(self.f_a_proj(hidden_states))).unflatten(-1, (self.heads, -1)) + self.dt_bias
        return -widen(self.A_log).exp()[:, None] * F.softplus(logits)
