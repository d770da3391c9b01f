"""DeltaNet (Yang et al., 2025c): a new value replaces what the state holds for its key (paper Table 10).

    beta_t = sigmoid(x_t W_b)        one per head
    S_t = (I - beta_t k_t^T k_t) S_(t-1) + beta_t k_t^T v_t        o_t = q_t S_t / sqrt(D)

Keys have length one, so F_t has the eigenvalue 1 - beta_t along k_t and one elsewhere.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .cache import State
from .configuration_hypenet import HypeNetConfig
from .delta_rule import delta_rule
from .mixers import mixer
from .rnn_mixer import RNNMixer, RNNOptions


@dataclass(frozen=True, kw_only=True)
class DeltaNetOptions(RNNOptions):
    """RNNOptions, with what Table 15 gives GDN for queries, keys and values, and:

    Attributes:
        negative_eigenvalues: double beta, so that 1 - beta_t lies in (-1, 1).
    """

    qk_norm: str | None = "l2"
    activation: str | None = "silu"
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qk_norm != "l2":
            raise ValueError(f"qk_norm must be 'l2', not {self.qk_norm!r}: with longer keys the delta rule diverges.")


@mixer("deltanet")
class DeltaNet(RNNMixer):
    """DeltaNet. `b_proj` is W_b."""

    Options = DeltaNetOptions
    options: DeltaNetOptions
    recurrence = staticmethod(delta_rule)
    split = "heads"

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.b_proj = nn.Linear(config.hidden_size, self.heads, bias=False)

    def multiply_adds(self, seq_len: int) -> float:
        """D^2 each to read k S, to write, and to read q S."""
        return 3 * self.head_dim**2

    def log_decay(self, hidden_states: Tensor) -> Tensor | None:
        """The decay of the whole state, in the form of `delta_rule`: none here, one in mixers that derive."""
        return None

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor, tokens: Tensor | None, **carried: Any
    ) -> tuple[Tensor, State | None]:
        beta = torch.sigmoid(self.b_proj(hidden_states))
        if self.options.negative_eigenvalues:
            beta = 2 * beta
        return self.recurrence(q, k, v, beta, self.log_decay(hidden_states), scale=self.scaling, **carried)
