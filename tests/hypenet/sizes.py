"""The keys of the small models that these tests run."""

import torch
import transformers

from hypenet import mixers

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "rope_theta": 5000.0,
    "pad_token_id": 0,
    "eos_token_id": None,
}
SMALL = {"swa": {"window": 5}, "gsa": {"slots": 6}}
"""Options of mixers that make a few tokens many."""
MIXERS = ["lightning-attn", "attn", "lightning-attn", "attn"]
EACH = sorted(mixers.MIXERS) if transformers.__version__ < "5" else ["attn", "gdn", "lightning-attn", "swa"]
"""The mixers that stand for all: transformers 5 sees a cache, a state or a window, whatever is computed from it."""


def two_rows(length: int) -> torch.Tensor:
    """Ids of tokens, [2, length]."""
    return torch.randint(1, SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(6))


def left_padded(length: int, padding: int) -> torch.Tensor:
    """The mask of `two_rows`, with padding on the left of the second row."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :padding] = 0
    return mask
