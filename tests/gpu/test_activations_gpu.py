"""Checkpointed layers on a GPU: the same gradients, and as many layers as fit keep their activations."""

from unittest.mock import patch

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from halo.parallel import activations
from halo.parallel.prepare import prepare_model
from hypenet.transfer import hybrid_config, hybrid_from_teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def hybrid():
    torch.manual_seed(0)
    teacher = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    return (
        hybrid_from_teacher(teacher, hybrid_config(teacher.config, attention_layers=[1, 4])).cuda().bfloat16().train()
    )


def gradients(model, **arguments):
    torch.manual_seed(1)
    ids = torch.randint(512, (2, 1024), device="cuda")
    model.zero_grad(set_to_none=True)
    model(ids, use_cache=False, **arguments).logits.float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kept", [0, 3])
def test_gradients_are_those_without_checkpointing(attention, packed, kept):
    model = hybrid()
    model.set_attn_implementation(attention)
    arguments = {"position_ids": torch.arange(512, device="cuda").repeat(2, 2)} if packed else {}
    expected = gradients(model, **arguments)
    prepare_model(model, activation_checkpointing=True, kept_layers=kept)
    for tile in (1 << 20, 300):
        with patch("halo.parallel.activations.TILE", tile):
            found = gradients(model, **arguments)
        for name, gradient in found.items():
            error = (gradient.double() - expected[name].double()).norm() / expected[name].double().norm()
            assert error < 0.01, (name, error)


def test_as_many_layers_as_fit_keep_their_activations(capsys):
    model = hybrid()
    kept = prepare_model(model, activation_checkpointing=True, kept_layers=-1)
    for _ in range(2):
        assert kept.count == 0
        gradients(model)
    kept.adapt()
    free, total = torch.cuda.mem_get_info()
    room = free + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()
    each = kept.meter.most
    before = torch.cuda.memory_allocated()
    model.model.layers[0].gradient_checkpointing = False
    hidden = torch.randn(2, 1024, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rope = tuple(torch.randn(2, 1, 1024, 64, device="cuda", dtype=torch.bfloat16).unbind())
    output = model.model.layers[0](hidden, position_embeddings=rope)
    held = torch.cuda.memory_allocated() - before - output.nbytes
    assert each == pytest.approx(held, rel=0.15)
    del output, hidden
    with patch.object(activations, "MARGIN", (room - 3.5 * each) / total):
        kept.adapt()
    assert kept.count == 3  # of six
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True] * 3 + [False] * 3
    assert "3 of 6 layers keep their activations" in capsys.readouterr().out
    kept.adapt()
    assert kept.count == 3
