"""A teacher in FP8 on a GPU: the kernel against its reference, the product's error, the recorded forward, memory."""

import copy

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from halo.models.attention import this_machine
from halo.teacher.colocated import Teacher
from halo.teacher.fp8 import FP8_CAPABILITY, Fp8Linear, check_fp8, quantise_rows, quantised, to_fp8
from tests.halo.teacher.test_fp8 import rows_of_all_kinds

pytestmark = pytest.mark.skipif(
    (this_machine().capability or (0, 0)) < FP8_CAPABILITY, reason="needs a CUDA GPU with FP8 products"
)


def same_numbers(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """By their codes: a product of zero may have either sign, and NaN equals nothing."""
    return (x.view(torch.uint8) == y.view(torch.uint8)) | ((x.float() == 0) & (y.float() == 0))


@pytest.mark.parametrize("width", [16, 576, 1000, 2048, 6144, 12_288, 16_384, 20_000])
@pytest.mark.parametrize("count", [1, 7, 6144])
def test_the_kernel_is_the_reference(width, count):
    """Ada's kernel rounds twice, by way of float16: a code there may be the next one."""
    x = rows_of_all_kinds(width).cuda().repeat(-(-count // 7), 1)[:count].roll(1, 0)
    rows, scale = quantised(x)
    expected, scales = quantise_rows(x)
    assert torch.equal(scale, scales)
    if torch.cuda.get_device_capability() >= (9, 0):
        assert same_numbers(rows, expected).all()
    else:
        assert (rows.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs().max() <= 1


def test_plain_only(monkeypatch):
    monkeypatch.setenv("HYPENET_PLAIN", "1")
    test_a_layer_is_about_the_linear_one((300,), 2048, 6144, True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inner", "outer"), [(2048, 6144), (6144, 2048), (576, 192), (16, 16)])
@pytest.mark.parametrize("shape", [(1,), (3, 17), (12, 512)])
def test_a_layer_is_about_the_linear_one(shape, inner, outer, bias):
    torch.manual_seed(0)
    linear = nn.Linear(inner, outer, bias=bias, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(*shape, inner, device="cuda", dtype=torch.bfloat16)
    layer = Fp8Linear(linear)
    y, expected = layer(x), linear.float()(x.float())
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    assert (y - expected).norm() < 0.06 * expected.norm()
    reference = layer.cpu()(x.cpu().float()).cuda()  # dequantised, in float32
    assert (y - reference).norm() < 0.01 * reference.norm()


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    keys = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 1024}
    keys |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "initializer_range": 0.05}
    return Qwen3ForCausalLM(Qwen3Config(**keys)).cuda().bfloat16().eval().requires_grad_(False)


@torch.no_grad()
def test_a_recorded_teacher(model, monkeypatch):
    """It gives what the kernels one by one give, again and again, and nearly the logits of bf16."""
    in_fp8 = copy.deepcopy(model)
    for layer in in_fp8.model.layers:
        to_fp8(layer)
    teacher, plain = Teacher(in_fp8), Teacher(copy.deepcopy(model))
    tokens = torch.randint(0, 1024, (3, 4, 256), device="cuda")
    recorded = [teacher.logits(x).hidden for x in tokens]
    assert len(teacher._recorded) == 1
    monkeypatch.setattr(teacher, "_can_be_recorded", lambda _: False)
    for x, hidden in zip(tokens, recorded, strict=True):
        assert torch.equal(teacher.logits(x).hidden, hidden)
        p = (plain.hidden_states(x) @ plain.head.T).float().log_softmax(-1)
        q = (teacher.hidden_states(x) @ teacher.head.T).float().log_softmax(-1)
        assert 0 < (p.exp() * (p - q)).sum(-1).mean() < 0.05


def test_memory_is_halved(model):
    check_fp8(model.model.layers)
    before = torch.cuda.memory_allocated()
    layers = copy.deepcopy(model.model.layers)
    whole = torch.cuda.memory_allocated() - before
    for layer in layers:
        to_fp8(layer)
    assert torch.cuda.memory_allocated() - before < 0.52 * whole
