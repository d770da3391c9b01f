"""What the model makes of its arguments: masks, positions, and the bounds of packed documents.

Shapes: B batch, T tokens of this call, S tokens seen so far with these.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils import TransformersKwargs

from .cache import CACHE, HypeNetCache
from .configuration_hypenet import HypeNetConfig
from .implementations import like_sdpa
from .kernels import unvalued

_MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)


_KNOWN = {
    *TransformersKwargs.__annotations__,
    *("return_dict", "cache_position", "ignore_index", "shift_labels", "is_causal", "seq_idx"),
    "token_type_ids",  # some tokenizers give them; no causal model reads them
}


def known_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward that have no place in its signature, with fla's `cu_seqlens` by transformers' name.

    Raises:
        TypeError: one is unknown, or the bounds are there by both names.
    """
    kwargs = dict(kwargs)
    if (bounds := kwargs.pop("cu_seqlens", None)) is not None:
        if kwargs.get("cu_seq_lens_q") is not None:
            raise TypeError("Give the bounds of documents as cu_seq_lens_q or as cu_seqlens, not both.")
        kwargs["cu_seq_lens_q"] = bounds
    if unknown := kwargs.keys() - _KNOWN:
        raise TypeError(f"HypeNet's forward has no argument {', '.join(sorted(unknown))}.")
    return kwargs


def layer_masks(
    config: HypeNetConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: HypeNetCache | None,
    apart: Tensor | None,
) -> dict[str, Any]:
    """A mask for each kind of layer; for attention in the form of `config._attn_implementation`.

    The arguments of transformers' functions differ between its versions: they get those that they know.

    Args:
        attention_mask: [B, S], 1 at tokens and 0 at padding; or None: no padding.
        apart: [B, T], positions where documents are packed: a token sees no other document. Else None.
    """
    seen = 0 if cache is None else cache.get_seq_length()
    tokens = inputs_embeds.shape[1]
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "input_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "cache_position": torch.arange(seen, seen + tokens, device=inputs_embeds.device),
        CACHE: cache,
        "position_ids": apart,
    }
    arguments = {name: value for name, value in arguments.items() if name in _MASK_ARGUMENTS}
    masks: dict[str, Any] = {
        "linear_attention": None if attention_mask is None else _unless_full(attention_mask[:, -tokens:])
    }
    if "full_attention" in config.layer_types:
        masks["full_attention"] = create_causal_mask(**arguments)
    if "sliding_attention" in config.layer_types:
        # The layers apply the window themselves: without a mask, no [T, S] is made.
        without = like_sdpa(config._attn_implementation) and attention_mask is None and apart is None
        masks["sliding_attention"] = None if without else create_sliding_window_causal_mask(**arguments)
    return masks


def documents(
    position_ids: Tensor | None, bounds: Tensor | None, mask: Tensor | None, batch: int, tokens: int
) -> Tensor | None:
    """The bounds of documents packed into B x T tokens, [documents + 1] in int32, or None: each row is one document.

    A recorded graph has no documents but by `bounds`; it raises where its positions have them.

    Args:
        position_ids: [B or 1, T], counting from 0 anew in each document; where `bounds` is not known.
        bounds: the caller's `cu_seq_lens_q`.
        mask: [B, T], or None. With padding there are no packed documents.

    Raises:
        ValueError: `bounds` do not divide the tokens, or a document crosses from one row to the next.
    """
    if bounds is not None:
        given = bounds.tolist()
        rows = range(0, batch * tokens + 1, tokens)
        if given != sorted(set(given)) or given[0] != 0 or given[-1] != batch * tokens or not set(rows) <= set(given):
            raise ValueError(
                f"cu_seq_lens_q must rise from 0 to {batch * tokens}, and no document may cross from one of the "
                f"{batch} rows of {tokens} tokens to the next."
            )
        return bounds
    if position_ids is None:
        return None
    if unvalued(position_ids):
        one = (position_ids.diff() == 1).all()
        torch._assert_async(
            one if mask is None else one | ~mask.bool().all(),
            "Positions that begin anew in a row mark packed documents: a recorded graph takes cu_seq_lens_q.",
        )
        return None
    if mask is not None and not mask.all():
        return None
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff() != 1
    if not begins[:, 1:].any():
        return None
    bounds = begins.expand(batch, tokens).flatten().nonzero().flatten()
    return torch.cat([bounds, bounds.new_tensor([batch * tokens])]).int()


def packed_arguments(
    config: HypeNetConfig, bounds: Tensor, position_ids: Tensor | None, inputs_embeds: Tensor
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """What a forward of packed documents needs.

    Args:
        bounds: [documents + 1].
        position_ids: [B or 1, T], or None: each document counts from 0.
        inputs_embeds: [B, T, hidden].

    Returns:
        The positions; those from which a mask is made, or None: no mask; and the layers' arguments, by transformers'
        names.
    """
    batch, device = len(inputs_embeds), inputs_embeds.device
    sdpa = like_sdpa(config._attn_implementation)  # it computes each document in its own call
    bounds = bounds.cpu() if sdpa else bounds
    if position_ids is None:
        position_ids = positions_in_documents(bounds, batch).to(device)
    apart = None if sdpa else positions_in_documents(bounds, batch).to(device)
    longest = int(bounds.diff().max())
    arguments = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return position_ids, apart, arguments


def cached_tokens(cache: Any) -> int:
    """The number of tokens in the cache.

    Raises:
        ValueError: it is not a HypeNetCache.
    """
    if cache is None:
        return 0
    if not isinstance(cache, HypeNetCache):
        raise ValueError(f"past_key_values must be a HypeNetCache, not a {type(cache).__name__}.")
    return cache.get_seq_length()


def checked_mask(mask: Tensor | None, seen: int, tokens: int) -> Tensor | None:
    """`mask`, [B, S], or None if it marks no padding: as in most calls, and cheaper for every layer.

    Args:
        seen: the tokens in the cache.

    Raises:
        ValueError: the mask has another length than S.
    """
    if mask is not None and mask.shape[1:] != (seen + tokens,):
        raise ValueError(
            f"attention_mask must be [batch, {seen + tokens}], one entry for every token seen so far, "
            f"not {list(mask.shape)}."
        )
    return None if mask is None else _unless_full(mask)


def padding_to_pass(mask: Tensor | None, tokens: int, cache: HypeNetCache | None, *, training: bool) -> bool:
    """Whether the states of RNN layers must pass over padding: in this call it follows a token of its row.

    At the end of a row it matters to a cache alone. But evaluation gives the same with and without one. A recorded
    graph cannot pass padding, and raises when it must.

    Args:
        mask: [B, S].
        tokens: the length of this call, of which the mask has the last entries.
    """
    if mask is None:
        return False
    found = (mask.long().cumsum(-1) > 0) & (mask == 0)
    if cache is None and (training or unvalued(mask)):
        found &= mask.long().flip(-1).cumsum(-1).flip(-1) > 0
    if unvalued(mask):
        torch._assert_async(~found[:, -tokens:].any(), "Padding follows tokens: a recorded graph takes it on the left.")
        return False
    return bool(found[:, -tokens:].any())


def _unless_full(mask: Tensor) -> Tensor | None:
    return mask if unvalued(mask) or not mask.all() else None


def positions(attention_mask: Tensor | None, seen: int, tokens: int, device: torch.device) -> Tensor:
    """0-based positions of the last `tokens` tokens: [1, T], or [B, T] if a mask marks padding."""
    if attention_mask is None:
        return torch.arange(seen, seen + tokens, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def positions_in_documents(bounds: Tensor, batch: int) -> Tensor:
    """0-based positions, [B, T], each document counting from 0."""
    lengths = bounds.diff()
    within = torch.arange(int(bounds[-1]), device=bounds.device) - bounds[:-1].repeat_interleave(lengths)
    return within.view(batch, -1)
