"""HGRN-2 (Qin et al., 2024b): what a channel forgets is what its key writes (paper Table 10).

    k_t = (1 - beta) sigmoid(x_t W_k)        f_t = 1 - k_t        q_t = silu(x_t W_q)
    S_t = diag(f_t) S_(t-1) + RoPE(k_t)^T v_t        o_t = RoPE(q_t) S_t / sqrt(D)

So the teacher's W_k is the start of the forget gate. The lower bound beta of f is learnt, one per channel. HGRN-2 ties
the bounds of all layers to one another, so that they grow with depth. HALO trains each layer alone: here each has its
own, which begins at (l + 1) / (L + 1) in layer l = 0..L-1.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .cache import State
from .linear_attention import widen
from .mixers import mixer
from .rnn_mixer import OuterProductMixer, RNNOptions


@dataclass(frozen=True, kw_only=True)
class HGRN2Options(RNNOptions):
    """RNNOptions, without QK-norm, which would be one of the gate's logits, and:

    Attributes:
        query_activation: what queries go through, a name in transformers' ACT2FN, or None.
    """

    qk_norm: str | None = None
    query_activation: str | None = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_activation is not None and self.query_activation not in ACT2FN:
            raise ValueError(
                f"query_activation must be None or a name in transformers' ACT2FN, not {self.query_activation!r}."
            )


@mixer("hgrn2")
class HGRN2(OuterProductMixer):
    """HGRN-2. `lower_bound` are the logits of beta, one per channel of `k_proj`."""

    Options = HGRN2Options
    options: HGRN2Options
    lower_bound: nn.Parameter

    def first_values(self) -> dict[str, Tensor]:
        beta = (self.layer_idx + 1) / (self.config.num_hidden_layers + 1)
        return {"lower_bound": torch.full([self.k_proj.out_features], beta, dtype=torch.float32).logit()}

    def before_rope(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_t, k_t and the gates log f_t. `k` holds logits; f_t comes from them too: 1 - k_t rounds to zero where k_t
        is near one."""
        if self.options.query_activation is not None:
            q = ACT2FN[self.options.query_activation](q)
        logits, bound = widen(k), widen(self.lower_bound).view(-1, self.head_dim)
        keys = torch.sigmoid(-bound) * torch.sigmoid(logits)
        log_forget = torch.logaddexp(F.logsigmoid(-logits), F.logsigmoid(bound) + F.logsigmoid(logits))
        return q, keys.to(k.dtype), log_forget

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden_states: Tensor,
        tokens: Tensor | None,
        *,
        gates: Tensor | None = None,
        **carried: Any,
    ) -> tuple[Tensor, State | None]:
        """With the gates log f_t, [B, T, KV heads, D]."""
        assert gates is not None  # from before_rope
        decay = gates.repeat_interleave(self.queries_per_key, dim=2)
        return self.recurrence(q, k, v, decay, scale=self.scaling, **carried)
