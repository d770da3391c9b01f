"""Ranks that share sequences compute what one process does with whole ones."""

from dataclasses import replace

import pytest
import torch

from halo.config import Finetune
from hypenet.configuration_hypenet import ATTENTION
from hypenet.mixers import MIXERS
from tests.distributed import jobs, sequence_jobs
from tests.distributed.ranks import run_ranks
from tests.distributed.sequence_jobs import B

EVERY = sorted(MIXERS.keys() - {ATTENTION})
"""Attention is a layer of each."""


def differences(ours, theirs):
    """Relative ones: of the loss, and of each parameter's gradient."""
    (loss, gradients), (expected_loss, expected) = ours, theirs
    assert gradients.keys() == expected.keys()
    assert all(gradient.any() for gradient in expected.values())
    apart = {name: float((gradients[name] - of_one).norm() / of_one.norm()) for name, of_one in expected.items()}
    return apart | {"loss": float((loss - expected_loss).abs() / expected_loss)}


def worst(ours, theirs):
    return max(differences(ours, theirs).values())


@pytest.fixture(scope="module")
def one_process():
    return {dtype: sequence_jobs.of_mixers(EVERY, None, dtype) for dtype in (torch.float32, torch.float64)}


@pytest.mark.parametrize("zero", [None, "zero3.json"])
@pytest.mark.parametrize("degree", [2, 4])
def test_loss_and_gradients_of_every_mixer(one_process, degree, zero):
    """Within 1e-5 of one process, or where that itself is off by more (Mamba2's A), within twice so much."""
    for of_rank in run_ranks(degree, sequence_jobs.of_mixers, EVERY, zero):
        for case, expected in one_process[torch.float32].items():
            rounding = differences(expected, one_process[torch.float64][case])
            apart = differences(of_rank[case], expected)
            assert {n: d for n, d in apart.items() if d > max(1e-5, 2 * rounding[n])} == {}, case


def test_in_double_precision(one_process):
    for of_rank in run_ranks(4, sequence_jobs.of_mixers, EVERY, None, torch.float64):
        for case, expected in one_process[torch.float64].items():
            assert worst(of_rank[case], expected) <= 1e-11, case


def test_flash_attention_shares_sequences_too():
    mixers = ["lightning-attn", "swa"]
    expected = sequence_jobs.with_flash_attention(mixers)
    for of_rank in run_ranks(2, sequence_jobs.with_flash_attention, mixers):
        assert [worst(*pair) <= 1e-9 for pair in zip(of_rank, expected, strict=True)] == [True] * 3


def test_stages_1_and_2():
    expected = sequence_jobs.of_stages("lightning-attn")
    for of_rank in run_ranks(2, sequence_jobs.of_stages, "lightning-attn"):
        assert {stage: worst(of_rank[stage], expected[stage]) <= 1e-5 for stage in expected} == dict.fromkeys(
            ["align", "distill"], True
        )


@pytest.mark.parametrize("zero", [None, "zero3.json"])
def test_with_all_that_spares_memory(one_process, zero):
    for of_rank in run_ranks(2, sequence_jobs.in_tiles, zero):
        assert worst(of_rank, one_process[torch.float32]["lightning-attn", "packed"]) <= 1e-5


@pytest.mark.parametrize(
    ("what", "mixer"),
    [("states of other ranks", "lightning-attn"), ("no decay", "retnet"), ("heads of other ranks", "gdn")],
)
def test_a_wrong_exchange_is_noticed(one_process, what, mixer):
    for of_rank in run_ranks(4, sequence_jobs.with_a_wrong_exchange, what, mixer):
        assert worst(of_rank, one_process[torch.float32][mixer, "whole"]) > 1e-2


def test_bytes_on_the_wire():
    """The formulas of docs/long-context.md, for 4 heads of 8, 2 of them key and value heads, in float32."""
    heads, kv_heads, width = (jobs.SHAPE[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    for degree in (2, 4):
        for length in (32, 64):
            state = 4 * B * heads * width
            by_token = 2 * 4 * B * (length // degree) * (degree - 1) // degree  # of one element, there and back
            kv = max(kv_heads, degree)  # repeated where the ranks outnumber them
            expected = {
                "lightning-attn": {"all_gather": (degree - 1) * state * (width + 1 + width)},
                "gdn": {"all_to_all_single": by_token * heads * (4 * width + 2)},
                "attn": {"all_to_all_single": by_token * width * (2 * heads + 2 * kv)},
            }
            found = run_ranks(degree, sequence_jobs.bytes_received, list(expected), length)
            assert found == [expected] * degree


def test_training_by_groups_of_ranks_is_that_of_one(tmp_path, shards):
    settings = Finetune(seq_len=16, batch=4, micro_batch=1, steps=6, lr=1e-3, warmup=2, mask_documents=True)
    (one,) = run_ranks(1, sequence_jobs.finetune, shards, tmp_path / "one", "zero1.json", settings)
    shared = replace(settings, sequence_parallel=2)
    first, *_ = run_ranks(4, sequence_jobs.finetune, shards, tmp_path / "four", "zero3.json", shared)
    assert first.loss == pytest.approx(one.loss, rel=1e-5)
    for name, weight in one.weights.items():
        torch.testing.assert_close(first.weights[name], weight, rtol=1e-3, atol=1e-4)


def test_evaluation_by_groups_of_ranks_is_that_of_one():
    generator = torch.Generator().manual_seed(5)
    lengths = (31, 40, 33, 36, 29, 38, 35)  # none of which two ranks divide with its answer
    samples = sequence_jobs.answers([torch.randint(0, 63, (n,), generator=generator).tolist() for n in lengths])
    ids = torch.randint(0, 63, (5, 48), generator=generator)
    recall, loss, of_teacher = sequence_jobs.evaluate(samples, ids, 1)
    assert recall == pytest.approx(4 / 7)
    for found in run_ranks(4, sequence_jobs.evaluate, samples, ids, 2):
        assert found == pytest.approx((recall, loss, of_teacher), rel=1e-6)
