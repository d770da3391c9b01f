"""Gated linear attention (Yang et al., 2024): a decay per token and channel, made from the input (paper Table 11).

    S_t = diag(alpha_t) S_(t-1) + k_t^T v_t        o_t = q_t S_t / sqrt(D)
    alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/16)

W_1 [hidden, 16] and W_2 [16, H D] are drawn as any other matrix and b [H D] begins at zero, as in GLA's own
implementation: at first every channel forgets half of what it holds in 16 tokens.
"""

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
class GLAOptions(RNNOptions):
    """RNNOptions, without QK-norm (Table 15), and:

    Attributes:
        gate_low_rank_dim: the width between W_1 and W_2 (Table 15).
        gate_logit_normalizer: what the log-decay is divided by.
    """

    qk_norm: str | None = None
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: float = 16


@mixer("gla")
class GatedLinearAttention(OuterProductMixer):
    """GLA. `gate_down` is W_1, `gate_up` is W_2."""

    Options = GLAOptions
    options: GLAOptions
    gate_bias: nn.Parameter

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width, rank = self.heads * self.head_dim, self.options.gate_low_rank_dim
        self.gate_down = nn.Linear(config.hidden_size, rank, bias=False)
        self.gate_up = nn.Linear(rank, width, bias=False)

    def first_values(self) -> dict[str, Tensor]:
        return {"gate_bias": torch.zeros(self.heads * self.head_dim)}

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor, tokens: Tensor | None, **carried: Any
    ) -> tuple[Tensor, State | None]:
        logits = widen(self.gate_up(self.gate_down(hidden_states))) + self.gate_bias
        decay = F.logsigmoid(logits).view_as(q) / self.options.gate_logit_normalizer
        return self.recurrence(q, k, v, decay, scale=self.scaling, **carried)
