"""The two families of attention implementations, told apart by the mask that transformers makes for them.

`config._attn_implementation` may name any function that is registered with transformers. What a layer must know of it
is the form of its mask, which its mask function decides:

    like sdpa     [B, 1, T, S], or None: causal. Of packed documents, a call for each.
    like flash    [B, S], 1 at tokens and 0 at padding, or None. Causal by itself, takes the bounds of packed documents
                  and the window.

Anything else (eager, flex attention) sees what its mask lets it see.
"""

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


def like_sdpa(implementation: str | None) -> bool:
    return _mask_function_of(implementation, "sdpa")


def like_flash(implementation: str | None) -> bool:
    return _mask_function_of(implementation, "flash_attention_2")


def _mask_function_of(implementation: str | None, family: str) -> bool:
    return ALL_MASK_ATTENTION_FUNCTIONS.get(implementation) is ALL_MASK_ATTENTION_FUNCTIONS[family]
