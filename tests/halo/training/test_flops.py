"""Useful FLOPs against what torch counts of what runs on the CPU, within the differences that are stated."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM, Qwen3ForCausalLM

from halo.stages.align import new_mixers
from halo.teacher.colocated import Teacher
from halo.training.flops import align_flops, distill_flops, forward_flops, next_token_flops, sequence_flops
from halo.training.objectives import Alignment, Distillation, NextToken
from hypenet import HypeNetForCausalLM
from hypenet.linear_attention import linear_attention_chunked
from hypenet.mixers import MIXERS
from hypenet.transfer import hybrid_config
from tests.distributed.jobs import SHAPE, batch_of, make_student, make_teacher
from tests.halo.teachers import teacher_config

B, T = 2, 64
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
CHUNK = 32  # of the plain form of Lightning, with heads of 8
ANGLES = 2 * SHAPE["head_dim"] // 2 / B
"""RoPE's angles, a token: torch counts them as a matrix product, once a model's forward for all rows."""


def counted(run: Callable[[], object]) -> float:
    """What torch counts of matrix products, a token."""
    # torch counts attention in matrix products alone, not in the kernel that some CPUs have for it.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops() / (B * T)


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (B, T), generator=torch.Generator().manual_seed(0))


def attention(model: nn.Module) -> float:
    """Of softmax attention, forward, a token. torch counts twice of it: also the tokens in the future."""
    return sum(sequence_flops(module, T) for module in model.modules() if not _is_rnn(module))


def _is_rnn(module: nn.Module) -> bool:
    return hasattr(module, "recur")


def chunks(model: nn.Module) -> float:
    """What the chunked form of Lightning adds forward, a token: the scores of a chunk, and their use."""
    return sum(2 * 2 * CHUNK * m.heads * m.head_dim for m in model.modules() if _is_rnn(m))


def test_a_transformer_forward():
    model = make_teacher().eval()
    with torch.no_grad():
        assert counted(lambda: model(tokens())) == forward_flops(model, T) + attention(model) + ANGLES


def test_a_hybrid_forward():
    model = make_student(make_teacher()).eval()
    with torch.no_grad():
        count = counted(lambda: model(tokens(), use_cache=False))
    assert count == forward_flops(model, T) + attention(model) + chunks(model) + ANGLES


def test_the_chunked_form_of_a_recurrence():
    """4 D^2 of the recurrence, and 4 C D that the form adds."""
    q, k, v = (torch.randn(B, T, 3, 16) for _ in range(3))
    count = counted(lambda: linear_attention_chunked(q, k, v, None, scale=1.0))
    assert count == 3 * (4 * 16**2 + 4 * 32 * 16)


def test_stage_3():
    model = make_student(make_teacher()).train()
    objective = NextToken(model)
    count = counted(lambda: objective(batch_of(objective, tokens()))[0].backward())
    differences = 3 * attention(model) + 3 * chunks(model) + ANGLES
    assert count == pytest.approx(next_token_flops(model, T) + differences)


def test_stage_2():
    teacher = make_teacher()
    objective = Distillation(make_student(teacher).train(), Teacher(teacher))
    count = counted(lambda: objective(batch_of(objective, tokens()))[0].backward())
    differences = 3 * attention(objective.student) + 3 * chunks(objective.student) + attention(teacher)
    differences += 2 * ANGLES
    assert count == pytest.approx(distill_flops(objective.student, teacher, T) + differences)


def test_stage_1():
    """The input of a mixer has no gradient: its projections' backward is half of that of others."""
    teacher = make_teacher()
    objective = Alignment(new_mixers(teacher, "lightning-attn"), Teacher(teacher))
    count = counted(lambda: objective(batch_of(objective, tokens()))[0].backward())
    expected = align_flops(objective.mixers.values(), teacher.model, T)
    assert count == pytest.approx(expected + attention(teacher) + 3 * chunks(objective.mixers) + ANGLES)
    one = objective.mixers["0"]
    inputs = sum(p.weight.numel() for p in (one.q_proj, one.k_proj, one.v_proj, one.z_proj))
    lightning = 4 * one.heads * one.head_dim**2
    by_hand = 4 * inputs + 6 * one.o_proj.weight.numel() + 3 * lightning
    assert align_flops([one], nn.Identity(), T) == by_hand


@pytest.mark.parametrize("name", ["Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B"])
def test_by_hand_at_full_size(name):
    """Every weight but the embedding's twice, and of a token's attention T / 2 keys and values of every head."""
    config = teacher_config(name)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    d, layers, heads, f = (getattr(config, key) for key in SIZES)
    weights = layers * (d * 128 * (2 * heads + 2 * 8) + 3 * d * f) + d * 151_936
    assert forward_flops(model, 512) == 2 * weights + layers * 2 * 2 * heads * 128 * 256


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_mixer_has_a_count(mixer):
    config = hybrid_config(make_teacher().config, [0, 1, 2, 3] if mixer == "attn" else [], rnn_mixer=mixer)
    with torch.device("meta"):
        model = HypeNetForCausalLM(config)
    layers = [sequence_flops(layer.self_attn, 4096) for layer in model.model.layers]
    d = SHAPE["head_dim"] ** 2
    heads = SHAPE["num_attention_heads"]
    seen = {"attn": 2048, "swa": 512 - 512**2 / 8192}
    states = {"gsa": 4 * 8 * 64, "deltanet": 3 * d, "gdn": 3 * d, "kda": 3 * d, "ttt": 3 * d, "rwkv7": 4 * d}
    if mixer in seen:
        assert layers == [4 * heads * 8 * seen[mixer]] * 4
    else:
        assert layers == [2 * heads * states.get(mixer, 2 * d)] * 4


def test_a_teachers_sliding_window():
    small = {**SHAPE, "sliding_window": 16}
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(**small))
    assert sequence_flops(model.model.layers[0].self_attn, T) == 4 * 4 * 8 * (16 - 16**2 / (2 * T))
    assert sequence_flops(model.model.layers[0].self_attn, 16) == 4 * 4 * 8 * 8


def test_shapes_are_enough():
    """Under ZeRO-3 weights are empty between their uses."""
    model = make_teacher()
    before = forward_flops(model, T)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert forward_flops(model, T) == before
