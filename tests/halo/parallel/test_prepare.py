"""What is done to a model's layers before it runs changes none of its results."""

from collections import Counter
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halo.parallel import activations
from halo.parallel.activations import KeptLayers
from halo.parallel.prepare import prepare_model
from halo.parallel.sequence import SequenceGroup
from hypenet.modeling_hypenet import HypeNetMLP
from tests.distributed.jobs import make_student, make_teacher

IDS = torch.arange(24).view(2, 12)


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(IDS, use_cache=False).logits.square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


class Counted(TorchDispatchMode):
    """Counts the operations that are computed."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("tile", [5, 1000])
@pytest.mark.parametrize("options", [{"kept_layers": 0}, {"kept_layers": 2}, {"activation_offload": True}])
def test_all_that_spares_memory_gives_the_same_gradients(tile, options):
    model = make_student(make_teacher()).train()
    expected = loss_and_gradients(model)
    prepare_model(model, sequence=SequenceGroup(), activation_checkpointing=True, **options)
    assert all(layer.mlp.forward.func is activations._in_tiles for layer in model.model.layers)
    with patch("halo.parallel.activations.TILE", tile):
        torch.testing.assert_close(loss_and_gradients(model), expected, rtol=0, atol=0 if tile == 1000 else 1e-6)


def test_a_checkpointed_layer_computes_neither_attention_nor_its_last_mlp_twice():
    model = make_student(make_teacher()).train()
    prepare_model(model, activation_checkpointing=True)
    calls = Counter()
    for i, layer in enumerate(model.model.layers):
        tiled = layer.mlp.forward
        layer.mlp.forward = partial(tiled.func, tiled.args[0], partial(counted, calls, i, tiled.args[1]))
    with patch("halo.parallel.activations.TILE", 6), Counted() as operations:
        loss_and_gradients(model)
    attention = sum(count for name, count in operations.names.items() if "attention" in name and "back" not in name)
    assert attention == 1  # of one attention layer
    assert calls == dict.fromkeys(range(4), 8)  # four tiles: in forward, and for the gradients of each


def counted(calls, name, function, x):
    calls[name] += 1
    return function(x)


def test_the_last_layers_are_kept():
    layers = [torch.nn.Linear(1, 1) for _ in range(5)]
    for given, expected in ((0, 0), (2, 2), (9, 5), (-1, 0)):  # there is no GPU's memory to fill
        kept = KeptLayers(layers, given)
        kept.adapt() if not torch.cuda.is_available() else None
        assert kept.count == expected
        assert [layer.gradient_checkpointing for layer in layers] == [True] * (5 - expected) + [False] * expected


def test_a_teacher_is_fused_before_its_mlps_are_tiled():
    teacher = make_teacher()
    prepare_model(teacher, fused=True, tiled=True)
    tiled = teacher.model.layers[0].mlp.forward
    assert isinstance(tiled, partial) and tiled.func is activations._in_tiles
    assert tiled.args[1].func is HypeNetMLP.forward


def test_nothing_is_done_that_is_not_asked_for():
    teacher = make_teacher()
    before = {name: dict(vars(module)) for name, module in teacher.named_modules()}
    prepare_model(teacher)
    assert before == {name: dict(vars(module)) for name, module in teacher.named_modules()}
