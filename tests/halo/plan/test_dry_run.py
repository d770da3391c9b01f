"""The dry run of a plan against real bytes and operations."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from halo.plan import dry_run
from halo.plan.dry_run import DryRun, cost_of, frozen_cost_of
from hypenet import HypeNetConfig, fused, losses
from hypenet.kernels import serves
from hypenet.mixers import MIXERS
from hypenet.modeling_hypenet import HypeNetDecoderLayer


def tiny_layer(mixer: str, device: str) -> tuple[nn.Module, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """A layer, its input, and RoPE's cos and sin."""
    config = HypeNetConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        mixer_types=[mixer],
        attn_implementation="sdpa",
    )
    with torch.device(device):
        layer = HypeNetDecoderLayer(config, 0).train()
        hidden = torch.ones(2, 64, 32, requires_grad=True)
        rope = torch.ones(1, 64, 8), torch.ones(1, 64, 8)
    return layer, hidden, rope


def saved_bytes(mixer: str) -> int:
    """What autograd really keeps of a layer on the CPU, beside parameters, RoPE and the input."""
    layer, hidden, rope = tiny_layer(mixer, "cpu")
    given = {id(x.untyped_storage()) for x in (*layer.parameters(), hidden, *rope)}
    kept: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in given:
            kept[id(storage)] = weakref.ref(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(hidden, position_embeddings=rope, attention_mask=None)
    assert output.requires_grad  # it is alive, and so is what it keeps; what other operations kept is gone
    return sum(storage.nbytes() for storage in (ref() for ref in kept.values()) if storage is not None)


@pytest.mark.parametrize("mixer", ["lightning-attn", "gla", "gdn"])
def test_what_a_layer_keeps_is_what_autograd_really_saves(mixer, monkeypatch):
    """In plain torch, as on the CPU: without the stand-ins for a GPU's kernels."""
    monkeypatch.setattr(dry_run, "_replaced_kernels", lambda run: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    layer, hidden, rope = tiny_layer(mixer, "meta")
    cost = cost_of(layer, lambda: layer(hidden, position_embeddings=rope, attention_mask=None))
    assert cost.kept == pytest.approx(saved_bytes(mixer), rel=0.01)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_mixer_can_be_run(mixer):
    layer, hidden, rope = tiny_layer(mixer, "meta")

    def run() -> torch.Tensor:
        return layer(hidden, position_embeddings=rope, attention_mask=None)

    cost = cost_of(layer, run)
    assert 0 < cost.kept < cost.peak
    assert sum(op.flops for op in cost.backward.operations) > sum(op.flops for op in cost.forward.operations) > 0
    peak, work = frozen_cost_of(run)
    assert 0 < peak < cost.peak
    assert work.dispatched > 0


def test_nothing_stays_replaced():
    before, run_program = torch.nn.functional.scaled_dot_product_attention, fused.run_program
    with pytest.raises(ZeroDivisionError), DryRun():
        assert serves(torch.empty(1, device="meta"))
        assert fused.run_program is losses.run_program is not run_program
        _ = 1 / 0
    assert not serves(torch.empty(1, device="meta")) and fused.run_program is losses.run_program is run_program
    assert torch.nn.functional.scaled_dot_product_attention is before


@pytest.mark.parametrize("tokens", [4096, 65_536])
def test_the_next_token_loss_needs_its_gradients_and_a_chunk(tokens):
    """Of many chunks, the head's gradient is summed in float32."""
    with torch.device("meta"):
        head = nn.Linear(512, 151_936, bias=False, dtype=torch.bfloat16)
        hidden = torch.empty(tokens, 512, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(tokens, dtype=torch.int64)
    cost = cost_of(head, lambda: losses.linear_cross_entropy(hidden, head.weight, labels))
    of_head, many = head.weight.nbytes, tokens == 65_536
    assert cost.kept == pytest.approx(hidden.nbytes + of_head, rel=0.01)
    assert cost.peak == pytest.approx(hidden.nbytes + losses.CHUNK_BYTES + (2 * of_head if many else of_head), rel=0.1)
    products = sum(op.flops for op in cost.forward.operations if op.kind == "product")
    assert products == 3 * 2 * tokens * 512 * 151_936
    assert any(op.kind == "kernel" for op in cost.forward.operations)


def test_memory_that_is_freed_is_not_counted():
    x = torch.empty(1000, device="meta")
    with DryRun() as run:
        y = x + 1
        z = y.view(10, 100).t()
        assert run.live == 4000
        del y
        assert run.live == 4000
        w = z * 2
        assert (run.live, run.peak) == (8000, 8000)
        del z, w
        assert (run.live, run.peak) == (0, 8000)
