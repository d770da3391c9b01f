"""The kernels of fixed decays, compiled, against the chunked form in float64: outputs, states and every gradient."""

import pytest
import torch

from hypenet.fixed_decay import LEAST_LOG_DECAY, fixed_decay_attention, fixed_decay_serves
from hypenet.linear_attention import each_document, linear_attention_chunked
from hypenet.mixer_lightning import lightning_log_decay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TOLERANCE = 0.005
"""Of the norm: what rounding inputs and outputs to bfloat16 costs."""
H = 5
DECAYS = {
    "Lightning": lambda: lightning_log_decay(H, torch.device("cuda")),
    "strongest": lambda: torch.full((H,), LEAST_LOG_DECAY, device="cuda"),
    "none": lambda: None,
}
BOUNDS = [0, 1, 1, 700, 3000, 5003]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (32, 32), (80, 96), (256, 256)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_outputs_states_and_gradients(dims, decay, packed):
    torch.manual_seed(0)
    batch, tokens = (1, BOUNDS[-1]) if packed else (2, 5003)
    documents = len(BOUNDS) - 1 if packed else batch
    q, k = (torch.randn(batch, tokens, H, dims[0], device="cuda").bfloat16() for _ in range(2))
    v, to_output = (torch.randn(batch, tokens, H, dims[1], device="cuda").bfloat16() for _ in range(2))
    first, to_left = (torch.randn(documents, H, *dims, device="cuda") for _ in range(2))
    log_decay = DECAYS[decay]()
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32) if packed else None
    scale = dims[0] ** -0.5
    assert fixed_decay_serves(q, v, log_decay)

    inputs = [x.clone().requires_grad_() for x in (q, k, v, first)]
    output, left = fixed_decay_attention(
        *inputs[:3], log_decay, scale=scale, state=inputs[3], keep_state=True, cu_seqlens=cu_seqlens
    )
    assert left is not None and left.dtype == torch.float32
    got = [output, left, *torch.autograd.grad([output, left], inputs, [to_output, to_left])]

    exact = [x.double().requires_grad_() for x in (q, k, v, first)]
    wide = None if log_decay is None else log_decay.double()
    if cu_seqlens is not None:
        given = (*exact[:3], wide)
        whole = torch.tensor([BOUNDS[0], *BOUNDS[2:]])  # the chunked form knows no empty document
        kept = [0, 2, 3, 4]
        output, left = each_document(linear_attention_chunked, given, whole, state=exact[3][kept], scale=scale)
        to_kept, empty = to_left.double()[kept], to_left[1]
        torch.testing.assert_close((got[1][1], got[-1][1]), (first[1], empty))
        got[1] = got[1][kept]
    else:
        output, left = linear_attention_chunked(*exact[:3], wide, scale=scale, state=exact[3])
        to_kept = to_left.double()
    expected = [output, left, *torch.autograd.grad([output, left], exact, [to_output.double(), to_kept])]
    if packed:
        expected[-1][1] = to_left[1]
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
    print(dims, decay, packed, [f"{error:.4f}" for error in errors])
    assert max(errors) < TOLERANCE, errors


def test_what_is_left_to_other_kernels():
    x = torch.zeros(1, 64, 1, 32, device="cuda", dtype=torch.bfloat16)
    decay = torch.tensor([LEAST_LOG_DECAY], device="cuda")
    assert fixed_decay_serves(x, x, decay)
    assert not fixed_decay_serves(x.half(), x.half(), decay)
    assert not fixed_decay_serves(x, x, 2 * decay)
    assert not fixed_decay_serves(x, x, decay.requires_grad_())
