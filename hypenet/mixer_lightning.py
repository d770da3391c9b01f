"""Lightning Attention, HypeNet's own RNN mixer: one fixed decay per head (paper Eq. 18 and 19).

S_t = gamma_h S_(t-1) + k_t^T v_t        o_t = q_t S_t / sqrt(D)
"""

from typing import Any

import torch
from torch import Tensor

from .cache import State
from .kernels import kept
from .mixers import mixer
from .rnn_mixer import OuterProductMixer


def alibi_slopes(heads: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The slopes 2^(-8h/H), h = 1..H, of Eq. 19, as [H].

    Where H is no power of two: the slopes of the largest power of two below it, then every other slope of the
    next power, as ALiBi interpolates.
    """
    base = 2 ** (heads.bit_length() - 1)
    exponents = torch.arange(1, base + 1, device=device, dtype=dtype) * (8 / base)
    between = (2 * torch.arange(heads - base, device=device, dtype=dtype) + 1) * (4 / base)
    return torch.exp2(-torch.cat([exponents, between]))


@kept
def lightning_log_decay(heads: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """log(gamma_h) of Eq. 19, as [H]: the negated slopes."""
    return -alibi_slopes(heads, device, dtype)


@mixer("lightning-attn")
class LightningAttention(OuterProductMixer):
    """Its options are the published configuration's `lightning_*` keys."""

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor, tokens: Tensor | None, **carried: Any
    ) -> tuple[Tensor, State | None]:
        return self.recurrence(q, k, v, lightning_log_decay(self.heads, q.device), scale=self.scaling, **carried)
