"""fla's kernel, as HypeNet calls it, against the recurrence in float64.

The first call for each head dimension autotunes for minutes.
"""

import pytest
import torch

from hypenet import HypeNetConfig, HypeNetForCausalLM
from hypenet.kernels import serves
from hypenet.linear_attention import linear_attention, linear_attention_recurrence
from hypenet.mixer_lightning import log_decay
from tests.hypenet.sizes import MIXERS, SIZES

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(1200),
]


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def random_inputs(dtype, dim, length=200, batch=2, heads=4):
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    qkv = [normal(batch, length, heads, dim).to(dtype).requires_grad_() for _ in range(3)]
    return qkv, normal(batch, heads, dim, dim), normal(batch, length, heads, dim).to(dtype)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float32, 1e-5)])
def test_output_state_and_gradients(dtype, tolerance, dim, with_state):
    if dtype == torch.bfloat16:
        pytest.importorskip("fla")
        assert serves(torch.zeros(1, dtype=dtype, device="cuda"))
    qkv, state, do = random_inputs(dtype, dim)
    initial = state if with_state else None
    decay = log_decay(4, qkv[0].device)
    output, final = linear_attention(*qkv, decay, scale=dim**-0.5, state=initial, keep_state=True)
    output.backward(do)

    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected, expected_final = linear_attention_recurrence(
        *exact, decay.double(), scale=dim**-0.5, state=None if initial is None else initial.double()
    )
    expected.backward(do.double())
    assert output.dtype == dtype and final.dtype == torch.float32
    assert relative_error(output, expected) < tolerance
    assert relative_error(final, expected_final) < tolerance
    for x, x_exact in zip(qkv, exact, strict=True):
        assert relative_error(x.grad, x_exact.grad) < tolerance


@pytest.mark.parametrize("length", [1, 100])
def test_a_sequence_in_two_parts_is_the_sequence(length):
    """Prefill, then one token or another chunk from the state of the first."""
    qkv, _, _ = random_inputs(torch.bfloat16, 64, length=130 + length)
    decay = log_decay(4, qkv[0].device)
    whole, _ = linear_attention(*qkv, decay, scale=0.125)
    _, state = linear_attention(*(x[:, :130] for x in qkv), decay, scale=0.125, keep_state=True)
    rest, _ = linear_attention(*(x[:, 130:] for x in qkv), decay, scale=0.125, state=state)
    assert relative_error(rest, whole[:, 130:].double()) < 0.01


def test_a_bfloat16_hybrid_trains_and_generates():
    keys = {**SIZES, "hidden_size": 64, "head_dim": 64, "initializer_range": 0.02, "mixer_types": MIXERS}
    model = HypeNetForCausalLM(HypeNetConfig(**keys)).cuda().bfloat16()
    tokens = torch.randint(1, 61, (2, 300), device="cuda")
    loss = model.train()(tokens, labels=tokens).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    generated = model.eval().generate(tokens, max_new_tokens=5, do_sample=False)
    assert generated.shape == (2, 305)
