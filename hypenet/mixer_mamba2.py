"""Multi-head Mamba2 (Dao & Gu, 2024; paper App. G.1 and Table 11): a decay and a step size per token and head.

    dt_t = softplus(x_t W_dt + b_dt)        one per head
    S_t = exp(-dt_t A_h) S_(t-1) + dt_t k_t^T v_t        o_t = q_t S_t / sqrt(D) + D_h v_t

q, k and v are Mamba2's C, B and x. Mamba2 shares C and B among its heads; here each head has its own, as the
teacher's attention does. A and b_dt begin as in Mamba2: A is uniform in [1, 16], dt log-uniform in [0.001, 0.1].
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import State
from .configuration_hypenet import HypeNetConfig
from .linear_attention import widen
from .mixers import mixer
from .rnn_mixer import OuterProductMixer, RNNOptions


@dataclass(frozen=True, kw_only=True)
class Mamba2Options(RNNOptions):
    """RNNOptions, without QK-norm (Table 15)."""

    qk_norm: str | None = None


@mixer("mamba2")
class Mamba2(OuterProductMixer):
    """Multi-head Mamba2, with its names for what attention does not have: `A_log`, `dt_proj`, `dt_bias` and `D`."""

    Options = Mamba2Options
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.dt_proj = nn.Linear(config.hidden_size, self.heads, bias=False)

    def first_values(self) -> dict[str, Tensor]:
        dt = torch.empty(self.heads, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        rates = torch.empty(self.heads, dtype=torch.float32).uniform_(1, 16)
        # softplus of dt_bias is dt
        return {"dt_bias": dt.expm1().log(), "A_log": rates.log(), "D": torch.ones(self.heads)}

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor, tokens: Tensor | None, **carried: Any
    ) -> tuple[Tensor, State | None]:
        dt = F.softplus(widen(self.dt_proj(hidden_states)) + self.dt_bias)  # [B, T, H]
        decay = -dt * widen(self.A_log).exp()
        keys = (dt[..., None] * k).to(k.dtype)
        output, state = self.recurrence(q, keys, v, decay, scale=self.scaling, **carried)
        return output + self.D.to(v.dtype)[:, None] * v, state
