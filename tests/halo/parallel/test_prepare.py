"""What is done to a model's layers before it runs changes none of its results."""

from functools import partial
from unittest.mock import patch

import torch

from halo.parallel import activations
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


def test_all_that_spares_memory_gives_the_same_gradients():
    model = make_student(make_teacher()).train()
    expected = loss_and_gradients(model)
    prepare_model(model, sequence=SequenceGroup(), activation_checkpointing=True, activation_offload=True)
    assert all(layer._gradient_checkpointing_func is activations._offloaded for layer in model.model.layers)
    assert all(layer.mlp.forward.func is activations._in_tiles for layer in model.model.layers)
    with patch("halo.parallel.activations.TILE", 5):
        torch.testing.assert_close(loss_and_gradients(model), expected)


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
