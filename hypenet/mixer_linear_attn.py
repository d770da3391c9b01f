"""Linear attention (Katharopoulos et al., 2020): an outer-product state without decay (paper Table 10).

    S_t = S_(t-1) + k_t^T v_t        o_t = q_t S_t / sqrt(D)        q, k = RoPE(phi(Norm(x W))), phi(x) = elu(x) + 1

There is no denominator: thanks to the output norm of Eq. 14 the output does not grow with the number of tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .cache import State
from .mixers import mixer
from .rnn_mixer import OuterProductMixer, RNNOptions


@dataclass(frozen=True, kw_only=True)
class LinearAttentionOptions(RNNOptions):
    """RNNOptions, and:

    Attributes:
        feature_map: "elu": elu(x) + 1 on queries and keys, after the norm and before RoPE. None: none.
    """

    feature_map: str | None = "elu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_map not in ("elu", None):
            raise ValueError(f"feature_map must be 'elu' or None, not {self.feature_map!r}.")


@mixer("linear-attn")
class LinearAttention(OuterProductMixer):
    """Linear attention. All its weights come from the teacher's attention, except those that Eq. 14 adds."""

    Options = LinearAttentionOptions
    options: LinearAttentionOptions

    def before_rope(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, None]:
        """phi of queries and keys."""
        if self.options.feature_map == "elu":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        return q, k, None

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor, tokens: Tensor | None, **carried: Any
    ) -> tuple[Tensor, State | None]:
        return self.recurrence(q, k, v, None, scale=self.scaling, **carried)
