"""Sequence parallelism in one process: what is refused, and what each rank would have of packed rows."""

import pytest
import torch
from torch import nn

from halo.errors import UserError
from halo.parallel.checks import check_degree
from halo.parallel.exchanges import parallelize, repeats
from halo.parallel.sequence import Rows
from halo.teacher.batch import document_bounds, next_tokens
from hypenet import HypeNetConfig
from hypenet.losses import IGNORE
from hypenet.mixers import build_mixer
from tests.hypenet.sizes import SIZES


def mixers(*types: str, heads: int = 4) -> list[nn.Module]:
    sizes = SIZES | {"num_attention_heads": heads, "num_key_value_heads": 2, "num_hidden_layers": len(types)}
    config = HypeNetConfig(**sizes, mixer_types=list(types))
    return [build_mixer(config, i) for i in range(len(types))]


@pytest.mark.parametrize(
    ("degree", "ranks", "seq_len", "types", "says"),
    [
        (3, 8, 96, ["attn"], "does not divide the 8 ranks: use 2 or 4"),
        (8, 8, 96, ["attn"], "does not divide the 4 heads of HypeNetAttention: use 4"),
        (4, 8, 90, ["attn"], "does not divide a sequence of 90 tokens: use 2"),
        (16, 16, 96, ["gdn"], "does not divide the 4 heads of GatedDeltaNet: use 4"),
        (2, 1, 96, ["attn"], "does not divide the 1 ranks: use 1"),
        (4, 6, 96, ["lightning-attn"], "does not divide the 6 ranks: use 3 or 6"),
    ],
)
def test_what_does_not_divide_and_the_nearest_that_do(degree, ranks, seq_len, types, says):
    with pytest.raises(UserError) as refused:
        check_degree("finetune.sequence_parallel", degree, seq_len=seq_len, ranks=ranks, mixers=mixers(*types))
    assert str(refused.value) == f"finetune.sequence_parallel = {degree} {says}"


def test_what_divides():
    check_degree("x", 8, seq_len=96, ranks=16, mixers=mixers("lightning-attn", "gla"))  # they share no heads
    check_degree("x", 4, seq_len=96, ranks=4, mixers=mixers("attn", "gdn", "swa"))
    check_degree("x", 1, seq_len=97, ranks=3, mixers=[nn.Linear(1, 1)])


def test_a_mixer_that_cannot_be_split():
    with pytest.raises(UserError, match=r"^x = 2: Linear cannot be split over ranks: set it to 1$"):
        check_degree("x", 2, seq_len=96, ranks=2, mixers=[nn.Linear(1, 1)])
    with pytest.raises(ValueError, match=r"^Linear cannot be split over the ranks of a sequence\.$"):
        parallelize([nn.Linear(1, 1)], type("Group", (), {"degree": 2})())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "degree", "expected"), [(16, 8, 2, 1), (16, 8, 8, 1), (16, 8, 16, 2), (12, 6, 4, 2)]
)
def test_each_rank_has_the_key_heads_of_its_queries(heads, kv_heads, degree, expected):
    assert repeats(heads, kv_heads, degree) == expected
    served = torch.arange(kv_heads).repeat_interleave(expected).chunk(degree)
    asked = (torch.arange(heads) // (heads // kv_heads)).chunk(degree)
    for have, need in zip(served, asked, strict=True):
        assert torch.equal(have.repeat_interleave(len(need) // len(have)), need)


def test_documents_end_with_the_separator_or_the_row():
    ids = torch.tensor([[5, 0, 7, 7], [0, 0, 7, 0]])
    bounds = document_bounds(ids, 0)
    assert bounds.tolist() == [0, 2, 4, 5, 6, 8]
    assert next_tokens(ids, bounds).tolist() == [[0, IGNORE, 7, IGNORE], [IGNORE, IGNORE, 0, IGNORE]]
    assert next_tokens(ids).tolist() == [[0, 7, 7, IGNORE], [0, 7, 0, IGNORE]]


def test_what_the_second_of_two_ranks_has():
    """A document that continues and ends, one that fills the chunk, then one that continues through all of it."""
    bounds = torch.tensor([0, 2, 6, 8, 16])
    rows = Rows((2, 8), bounds, 2, 1)
    assert rows.chunk_bounds.tolist() == [0, 2, 4, 8]
    assert rows.row.tolist() == [0, 0, 1]
    assert rows.continued.tolist() == [True, False, True]
    assert rows.in_last.tolist() == [[False, False, True, True], [True] * 4]
    assert rows.unbroken.tolist() == [False, True]
    assert rows.positions().tolist() == [[2, 3, 0, 1], [4, 5, 6, 7]]
