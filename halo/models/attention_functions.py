"""The functions behind the implementations of softmax attention (halo/models/attention.py), as transformers calls them.

They are registered with transformers under names of their own, together with the mask function whose form they take:
without one transformers makes no mask, and padding would be seen. flash-attn's packages are called directly: what torch
activates in their stead replaces its own kernel in the whole process, sdpa's too.

Shapes: B rows, T queries, S keys (the last T are those of the queries), H heads, D width of a head.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from halo.models.attention import IMPLEMENTATIONS, PLAIN


def use_attention(owner: Any, name: str) -> Any:
    """Let a model compute its softmax attention with the implementation `name`. Before it is fused or parallelized.

    Args:
        owner: a model, or anything else whose layers read their configuration from its `config`.

    Returns:
        `owner`.
    """
    owner.config._attn_implementation = registered(name)
    return owner


@cache
def registered(name: str) -> str:
    """The name under which transformers knows an implementation, once it and its mask function are registered."""
    if name == PLAIN:
        return name
    known, own = IMPLEMENTATIONS[name], f"halo_{name}"
    function: Callable[..., Any] = _cudnn
    if known.module:
        function = partial(_flash, import_module(known.module))
    ALL_ATTENTION_FUNCTIONS.register(own, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(own, ALL_MASK_ATTENTION_FUNCTIONS[known.masks])
    return own


def _cudnn(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """transformers' sdpa, with cuDNN's kernel. A single query is torch's choice: it is no work, and cuDNN has none."""
    sdpa = ALL_ATTENTION_FUNCTIONS[PLAIN]
    if query.shape[2] == 1:
        return sdpa(module, query, *args, **kwargs)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(module, query, *args, **kwargs)


def _flash(
    kernels: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention by a flash-attn package, with transformers' convention.

    Args:
        kernels: a module with `flash_attn_func` and `flash_attn_varlen_func`.
        query: [B, H, T, D].
        key, value: [B, KV heads, S, D].
        attention_mask: [B, S], nonzero at tokens and 0 at padding; None: no padding.
        sliding_window: the tokens that a token sees, itself among them.
        cu_seq_lens_q: [documents + 1], the bounds of documents packed into the B x T tokens, on any device.
        max_length_q: tokens of the longest document.

    Returns:
        [B, T, H, D], zeros at padding; and no weights.
    """
    options: dict[str, Any] = {"softmax_scale": scaling, "causal": True}
    if sliding_window is not None:
        options["window_size"] = (sliding_window - 1, 0)
    if dropout:
        options["dropout_p"] = dropout
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is not None:
        return _without_padding(kernels, q, k, v, attention_mask, options), None
    if cu_seq_lens_q is None:
        return _output(kernels.flash_attn_func(q, k, v, **options)), None
    bounds = cu_seq_lens_q.to(q.device, torch.int32, non_blocking=True)
    output = kernels.flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=max_length_q,
        max_seqlen_k=max_length_q,
        **options,
    )
    return _output(output).view(q.shape), None


def _without_padding(kernels: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Attention over the tokens alone: q [B, T, H, D], k and v [B, S, KV heads, D], mask [B, S] -> [B, T, H, D].

    A row's queries are its last tokens, so that causal attention fits them to its keys from the end.
    """
    seen, asked = mask.bool(), mask[:, -q.shape[1] :].bool()

    def bounds(tokens: Tensor) -> Tensor:
        return F.pad(tokens.sum(1).cumsum(0), (1, 0)).int()

    output = kernels.flash_attn_varlen_func(
        q[asked],
        k[seen],
        v[seen],
        cu_seqlens_q=bounds(asked),
        cu_seqlens_k=bounds(seen),
        max_seqlen_q=int(asked.sum(1).max()),
        max_seqlen_k=int(seen.sum(1).max()),
        **options,
    )
    return torch.zeros_like(q).masked_scatter(asked[:, :, None, None], _output(output))


def _output(returned: Any) -> Tensor:
    """Some versions return the logarithms of the softmax's sums too."""
    return returned[0] if isinstance(returned, tuple) else returned
