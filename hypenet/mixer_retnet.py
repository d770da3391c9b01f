"""RetNet's retention (Sun et al., 2023): one fixed decay per head (paper Table 10).

S_t = gamma_h S_(t-1) + k_t^T v_t        o_t = q_t S_t / sqrt(D)        gamma_h = 1 - 2^(-5-h), h = 0..H-1
"""

from typing import Any

import torch
from torch import Tensor

from .cache import State
from .kernels import kept
from .mixers import mixer
from .rnn_mixer import OuterProductMixer


@kept
def retnet_log_decay(heads: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """log(gamma_h), as [H]. With many heads gamma rounds to one, its logarithm does not."""
    return torch.log1p(-torch.exp2(-5 - torch.arange(heads, device=device, dtype=dtype)))


@mixer("retnet")
class Retention(OuterProductMixer):
    """Lightning Attention with the decays of RetNet. Options: those of every RNN mixer."""

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor, tokens: Tensor | None, **carried: Any
    ) -> tuple[Tensor, State | None]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        decay = retnet_log_decay(self.heads, q.device, dtype)
        return self.recurrence(q, k, v, decay, scale=self.scaling, **carried)
