"""Sliding-window attention with RoPE: a token sees the last `window` tokens, itself among them (SWAN-GPT; Figure 7).

    o_t = softmax(q_t K_t^T / sqrt(D)) V_t        K_t, V_t: keys and values of tokens t - window + 1, ..., t

Shapes: B batch, H heads, T queries, S keys, D width, w window, N blocks. The last T keys are those of the queries.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_hypenet import SLIDING_WINDOW, WINDOW, HypeNetConfig
from .implementations import like_flash, like_sdpa
from .linear_attention import is_open
from .mixer_attention import HypeNetAttention
from .mixers import mixer


@dataclass(frozen=True, kw_only=True)
class SWAOptions:
    """The options of sliding-window attention.

    Attributes:
        window: the tokens that a token sees, itself among them.
        use_rope: RoPE on queries and keys.
        use_output_gate: the gate of Eq. 17.
    """

    window: int = WINDOW
    use_rope: bool = True
    use_output_gate: bool = False

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window must be at least 2, not {self.window}.")


@mixer(SLIDING_WINDOW)
class SlidingWindowAttention(HypeNetAttention):
    """HypeNet's attention within a window. Logits are not scaled: the context never grows."""

    Options = SWAOptions

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        options = config.options_of(SLIDING_WINDOW, self.Options)
        self.sliding_window = options.window
        self.use_rope = options.use_rope
        self.o_gate = None
        if options.use_output_gate:
            self.o_gate = nn.Linear(config.hidden_size, self.q_proj.out_features, bias=False)

    def scale_logits(self, q: Tensor, positions: Tensor | None) -> Tensor:
        """q as it is."""
        return q

    def attend_rows(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax attention within the window.

        For eager, sdpa and its like the window is applied here, so that a mask need not have it; flash attention
        applies it itself. Any other implementation relies on its mask.

        Args:
            q: [B, H, T, D].
            k, v: [B, KV heads, S, D].
            attention_mask: None: only causal; [B, 1, T, S], true or zero where a token may be seen; or [B, S], 1 at
                tokens and 0 at padding.

        Returns:
            The output, [B, T, H, D], and the attention weights if the implementation returns them.

        Raises:
            ValueError: there is no mask, and the implementation needs one.
        """
        implementation, window = self.implementation, self.sliding_window
        if implementation != "eager" and not like_sdpa(implementation):
            if attention_mask is None and k.shape[2] > window and not like_flash(implementation):
                raise ValueError(
                    f"Layer {self.layer_idx}: {implementation} sees beyond the window of {window} without a mask: "
                    "give one, or use sdpa, eager or flash attention."
                )
            return super().attend_rows(q, k, v, attention_mask, sliding_window=window, **kwargs)

        (queries, keys), mask = (q.shape[2], k.shape[2]), attention_mask
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None].bool()
        if is_open(queries) or is_open(keys):  # a recorded graph for any length: nothing is cut
            mask = _within(mask, self._band(queries, keys, q.device))
            return super().attend_rows(q, k, v, mask, **kwargs)
        keys = min(keys, queries + window - 1)  # the first query sees no further
        k, v, mask = k[:, :, -keys:], v[:, :, -keys:], None if mask is None else mask[..., -keys:]
        if like_sdpa(implementation) and queries > 2 * window:
            return self._attend_in_blocks(q, k, v, mask, **kwargs), None
        if implementation == "eager" and mask is None:
            mask = q.new_zeros(1, 1, queries, keys)
        if mask is not None or not (queries == 1 or queries == keys <= window):  # else sdpa's own causal mask is it
            mask = _within(mask, self._band(queries, keys, q.device))
        return super().attend_rows(q, k, v, mask, **kwargs)

    def _attend_in_blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Each block of w queries with its 2 w keys: time and memory are O(T w), not O(T S). Gives [B, T, H, D]."""
        (batch, _, queries, _), keys, window = q.shape, k.shape[2], self.sliding_window
        blocks = queries // window - 1
        first = queries - blocks * window  # at least w of them, so that all blocks after have 2 w keys
        seen = keys - queries + first
        if mask is not None:
            mask = mask.expand(batch, -1, queries, -1)
        head, _ = super().attend_rows(
            q[:, :, :first],
            k[:, :, :seen],
            v[:, :, :seen],
            _within(None if mask is None else mask[:, :, :first, :seen], self._band(first, seen, q.device)),
            **kwargs,
        )

        def overlapping(x: Tensor, dim: int) -> Tensor:
            """The N blocks' 2 w keys each: [..., N, ..., 2 w]."""
            return x.narrow(dim, seen - window, (blocks + 1) * window).unfold(dim, 2 * window, window)

        q = q[:, :, first:].unflatten(2, (blocks, window))  # [B, H, N, w, D]
        k, v = (overlapping(x, 2).mT for x in (k, v))  # [B, KV heads, N, 2 w, D]
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        if mask is not None:
            mask = overlapping(mask[:, :, first:].unflatten(2, (blocks, window)), 4)  # [B, 1, N, w, N, 2 w]
            mask = mask.diagonal(dim1=2, dim2=4).movedim(-1, 1).flatten(0, 1)  # [B N, 1, w, 2 w]
        tail, _ = super().attend_rows(q, k, v, _within(mask, self._band(window, 2 * window, q.device)), **kwargs)
        return torch.cat([head, tail.unflatten(0, (batch, blocks)).flatten(1, 2)], dim=1)

    def _band(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """[T, S], true where the last `queries` of `keys` tokens see a token."""
        back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
        return (back >= 0) & (back < self.sliding_window)


def _within(mask: Tensor | None, band: Tensor) -> Tensor:
    """`mask`, [B, 1, T, S] of booleans or added to the logits, or None: everything may be seen; limited to `band`."""
    if mask is None:
        return band
    return mask & band if mask.dtype == torch.bool else mask.masked_fill(~band, torch.finfo(mask.dtype).min)
