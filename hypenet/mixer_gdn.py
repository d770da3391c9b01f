"""Gated DeltaNet (Yang et al., 2025b): DeltaNet with a decay per token and head (paper Table 11).

    beta_t = 2 sigmoid(x_t W_b)        alpha_t = exp(-A_h softplus(x_t W_a + b_a))        one per head
    S_t = alpha_t (I - beta_t k_t^T k_t) S_(t-1) + beta_t k_t^T v_t        o_t = q_t S_t / sqrt(D)

A and b_a begin as in GDN's own implementation: A is uniform in (0, 16], softplus(b_a) log-uniform in [0.001, 0.1].
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_hypenet import HypeNetConfig
from .linear_attention import widen
from .mixer_deltanet import DeltaNet, DeltaNetOptions
from .mixers import mixer


@dataclass(frozen=True, kw_only=True)
class GDNOptions(DeltaNetOptions):
    """DeltaNetOptions, with negative eigenvalues (Table 15)."""

    negative_eigenvalues: bool = True


@mixer("gdn")
class GatedDeltaNet(DeltaNet):
    """GDN. `a_proj` is W_a, `dt_bias` is b_a, `A_log` is log(A)."""

    Options = GDNOptions
    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.a_proj = nn.Linear(config.hidden_size, self.heads, bias=False)

    def first_values(self) -> dict[str, Tensor]:
        rates = 16 * (1 - torch.rand(self.heads, dtype=torch.float32))
        return {"A_log": rates.log(), "dt_bias": initial_dt_bias(self.heads)}

    def log_decay(self, hidden_states: Tensor) -> Tensor:
        """log(alpha_t), [B, T, H]."""
        return -widen(self.A_log).exp() * F.softplus(widen(self.a_proj(hidden_states)) + self.dt_bias)


def initial_dt_bias(*shape: int) -> Tensor:
    """Biases whose softplus is log-uniform in [0.001, 0.1]."""
    return torch.empty(shape, dtype=torch.float32).uniform_(math.log(0.001), math.log(0.1)).exp().expm1().log()
