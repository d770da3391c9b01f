"""Attention of one layer in every case that training and evaluation have, against softmax attention in float64."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halo.models.attention_functions import registered
from hypenet import HypeNetConfig
from hypenet.inputs import layer_masks
from hypenet.mixer_attention import logits_scale
from hypenet.mixers import build_mixer
from tests.hypenet.sizes import SIZES

B, T, WINDOW, SCALING = 2, 203, 37, "hype 20"  # no block size divides 203
BOUNDS = [0, 1, 70, T, T + 64, 2 * T]
"""Of packed documents: one of a single token, one of a block's size, one of a whole row's rest."""
LENGTHS = [T, 77]
"""Tokens of each row, where rows are padded."""
CASES = ("causal", "scaled logits", "packed", "padding on the left", "padding on the right", "window")
HEADS = [(4, 4), (8, 2), (6, 1)]
"""Query heads, and heads of keys and values."""

Results = dict[str, Tensor]


def padding(case: str) -> Tensor | None:
    """[B, T], 1 at tokens and 0 at padding; None: no padding."""
    if not case.startswith("padding"):
        return None
    mask = torch.tensor([[1] * n + [0] * (T - n) for n in LENGTHS])
    return mask.flip(1) if case.endswith("left") else mask


def inputs(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v: [B, heads, T, D]."""
    draw = torch.Generator().manual_seed(heads * head_dim)
    made = [torch.randn(B, T, n, head_dim, generator=draw, dtype=torch.float64) for n in (heads, kv_heads, kv_heads)]
    return [x.to(device, dtype).transpose(1, 2).requires_grad_() for x in made]


def attended(implementation: str, case: str, qkv: list[Tensor]) -> Results:
    """The layer's output at tokens, [tokens, H, D], and the gradients of q, k and v."""
    q, k, v = qkv
    keys: dict[str, Any] = {"num_attention_heads": q.shape[1], "num_key_value_heads": k.shape[1]}
    keys |= {"head_dim": q.shape[3], "num_hidden_layers": 1, "mixer_types": ["swa" if case == "window" else "attn"]}
    keys |= {"mixer_options": {"swa": {"window": WINDOW}}} if case == "window" else {}
    config = HypeNetConfig(**SIZES | keys, attn_logits_scaling=SCALING if case == "scaled logits" else None)
    config._attn_implementation = registered(implementation)
    mixer: Any = build_mixer(config, 0).eval()
    mask = padding(case)
    if mask is not None:
        mask = mask.to(q.device)
    masks = layer_masks(config, q.new_empty(B, T, 1), mask, None, None)
    packed = {}
    if case == "packed":
        bounds = torch.tensor(BOUNDS, dtype=torch.int32)
        longest = int(bounds.diff().max())
        packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    q_ = mixer.scale_logits(q, torch.arange(T, device=q.device)[None])
    output, _ = mixer.attend(q_, k, v, masks[config.layer_types[0]], **packed)
    return _at_tokens(output, case, qkv)


def expected(case: str, qkv: list[Tensor]) -> Results:
    """The same in float64, of the same numbers."""
    wide = [x.detach().double().requires_grad_() for x in qkv]
    q, k, v = wide
    groups = q.shape[1] // k.shape[1]
    back = torch.arange(T)[:, None] - torch.arange(T)
    seen = (back >= 0).expand(B, T, T).clone()
    if case == "window":
        seen &= back < WINDOW
    if case == "packed":
        document = torch.repeat_interleave(torch.arange(len(BOUNDS) - 1), torch.tensor(BOUNDS).diff()).view(B, T)
        seen &= document[:, :, None] == document[:, None]
    if (mask := padding(case)) is not None:
        seen &= mask[:, None].bool()
        seen |= torch.eye(T, dtype=torch.bool)  # where nothing is seen, whatever it is does not count
    scaled = q
    if case == "scaled logits":
        scaled = q * logits_scale(torch.arange(T, device=q.device), SCALING)[:, None]
    k_, v_ = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("bhtd,bhsd->bhts", scaled, k_) * q.shape[3] ** -0.5
    weights = F.softmax(scores.masked_fill(~seen[:, None].to(q.device), -torch.inf), dim=-1)
    return _at_tokens(torch.einsum("bhts,bhsd->bthd", weights, v_), case, wide)


def _at_tokens(output: Tensor, case: str, qkv: list[Tensor]) -> Results:
    mask = padding(case)
    tokens = output if mask is None else output[mask.bool().to(output.device)]
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((tokens * weights.to(tokens)).sum(), qkv)
    return dict(zip(("output", "dq", "dk", "dv"), (tokens.detach(), *grads), strict=True))


def worst_error(actual: Results, exact: Results) -> float:
    """The largest difference, as a share of the norm of what is exact."""
    return max(float((actual[x].double() - exact[x]).norm() / exact[x].norm()) for x in exact)


def documents_apart(implementation: str, qkv: list[Tensor]) -> bool:
    """Whether a document's output keeps every bit when the others change."""
    whole = attended(implementation, "packed", qkv)["output"].flatten(0, 1)
    for a, b in pairwise(BOUNDS):
        others = torch.ones(B * T, 1, dtype=torch.bool, device=whole.device)
        others[a:b] = False
        changed = [
            (x.detach().transpose(1, 2).flatten(0, 1) * (1 + 9 * others[:, :, None]))
            .view(B, T, *x.shape[1::2])
            .transpose(1, 2)
            .requires_grad_()
            for x in qkv
        ]
        alone = attended(implementation, "packed", changed)["output"].flatten(0, 1)
        if not torch.equal(alone[a:b], whole[a:b]):
            return False
    return True
