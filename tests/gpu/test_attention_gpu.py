"""Every implementation of softmax attention that can run here, in bf16, against float64: outputs and gradients.

A package that is not installed is skipped, and the reason says how to get it. flash-attn 4 compiles a kernel for each
kind of call, for seconds.
"""

import pytest
import torch
from transformers import Qwen3Config

from halo.models.attention import IMPLEMENTATIONS, check_attention, choose, refusal, shape_of
from halo.models.attention_functions import use_attention
from halo.teacher.colocated import Teacher
from hypenet import HypeNetConfig, HypeNetForCausalLM
from tests.halo.models import attention_cases
from tests.hypenet.sizes import SIZES
from tests.hypenet.test_transfer import make_teacher

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(1200),
]

TOLERANCE = 0.01
"""Of the norm. bf16 keeps 8 bits: 0.2% of each number that is read, and as much of each intermediate product."""


@pytest.fixture(params=IMPLEMENTATIONS)
def name(request: pytest.FixtureRequest) -> str:
    """An implementation that can run here."""
    if reason := refusal(request.param, shape_of(Qwen3Config(head_dim=128), 512, trains=True)):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), attention_cases.HEADS)
@pytest.mark.parametrize("case", attention_cases.CASES)
def test_outputs_and_gradients(name, case, heads, kv_heads, head_dim):
    qkv = attention_cases.inputs(heads, kv_heads, head_dim, torch.bfloat16, "cuda")
    found = attention_cases.attended(name, case, qkv)
    assert attention_cases.worst_error(found, attention_cases.expected(case, qkv)) < TOLERANCE


def test_packed_documents_do_not_see_each_other(name):
    qkv = attention_cases.inputs(8, 2, 128, torch.bfloat16, "cuda")
    assert attention_cases.documents_apart(name, qkv)


@torch.no_grad()
def test_a_model_with_padding_and_a_cache(name):
    """Logits of padded prompts, then of one token more at a time."""
    torch.manual_seed(0)
    keys = SIZES | {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "initializer_range": 0.06}
    config = HypeNetConfig(**keys, mixer_types=["lightning-attn", "attn", "swa", "attn"], attn_logits_scaling="hype 50")
    model = HypeNetForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(1, SIZES["vocab_size"], (2, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :13] = 0

    def logits(implementation: str) -> torch.Tensor:
        use_attention(model, implementation)
        output = model(ids[:, :37], attention_mask=mask[:, :37], use_cache=True)
        parts = [output.logits]
        for t in range(37, 40):
            cache = output.past_key_values
            output = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
            parts.append(output.logits)
        return torch.cat(parts, dim=1)[mask.bool()]

    plain, found = logits("sdpa").float(), logits(name).float()
    assert (found - plain).norm() / plain.norm() < 0.02


def test_a_teacher_is_recorded_with_it(name):
    """The frozen teacher's forward is a CUDA graph: nothing in it may wait for the host, or compile anew."""
    model = make_teacher("qwen3", hidden_size=384, head_dim=64, initializer_range=0.06).to("cuda", torch.bfloat16)
    ids = torch.randint(0, SIZES["vocab_size"], (2, 128), device="cuda")
    with torch.no_grad():
        plain = use_attention(model, "sdpa").model(ids).last_hidden_state.float()
    teacher = Teacher(use_attention(model, name))
    assert teacher._can_be_recorded(ids)
    with torch.no_grad():
        teacher.logits(ids.flip(0))
        found = teacher.logits(ids)
        hidden = teacher.hidden_states(ids).float()
    replayed = found.parts[0].float().view(hidden.shape)
    assert torch.equal(replayed, hidden)
    assert (hidden - plain).norm() / plain.norm() < 0.02


@pytest.mark.parametrize("packed", [False, True])
def test_what_auto_takes_can_run(packed):
    shape = shape_of(Qwen3Config(head_dim=128), 16_384, packed, trains=True)
    check_attention(choose(shape), shape)
