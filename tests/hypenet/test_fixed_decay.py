"""The kernels of fixed decays, in Triton's interpreter, against the recurrence in float64. tests/gpu compiles them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hypenet import fixed_decay

INTERPRETED = """
import torch
from hypenet import fixed_decay
from hypenet.fixed_decay import fixed_decay_attention
from hypenet.linear_attention import each_document, linear_attention_recurrence
from hypenet.mixer_lightning import lightning_log_decay

fixed_decay.SHORTEST = fixed_decay.LONGEST = 64
torch.manual_seed(0)


def check(batch, tokens, heads, keys, values, *, bounds=None, state=False, decay=True):
    q, k = (torch.randn(batch, tokens, heads, keys) for _ in range(2))
    v, to_output = (torch.randn(batch, tokens, heads, values) for _ in range(2))
    documents = batch if bounds is None else len(bounds) - 1
    first, to_left = (torch.randn(documents, heads, keys, values) for _ in range(2))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    results = []
    for function, dtype in ((fixed_decay_attention, torch.float32), (linear_attention_recurrence, torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v, first)]
        given = inputs[3] if state else None
        gamma = lightning_log_decay(heads).to(dtype) if decay else None
        options = {"scale": 0.3, "state": given}
        if function is fixed_decay_attention:
            output, left = function(*inputs[:3], gamma, keep_state=state, cu_seqlens=cu_seqlens, **options)
        elif bounds is not None:
            output, left = each_document(function, (*inputs[:3], gamma), cu_seqlens, **options)
        else:
            output, left = function(*inputs[:3], gamma, **options)
        loss = (output * to_output).sum()
        if state:
            loss = loss + (left * to_left).sum()
        wanted = inputs if state else inputs[:3]
        results.append([output, *([left] if state else []), *torch.autograd.grad(loss, wanted)])
    for got, expected in zip(*results, strict=True):
        assert (got.double() - expected).norm() <= 1e-6 * expected.norm()


check(1, 203, 2, 32, 32, state=True)  # several segments, the last of them cut short
check(1, 140, 1, 24, 40, decay=False)  # widths that are no powers of two, and differ
check(2, 70, 2, 16, 16)  # one segment a row
check(1, 210, 2, 16, 16, bounds=[0, 5, 133, 134, 210], state=True)

# An empty document changes no other, and leaves the state that it was given.
q, k, v = (torch.randn(1, 130, 2, 16) for _ in range(3))
given = torch.randn(3, 2, 16, 16)
options = {"scale": 0.3, "keep_state": True}
some = torch.tensor([0, 70, 130])
output, left = fixed_decay_attention(q, k, v, None, state=given[[0, 2]], cu_seqlens=some, **options)
some = torch.tensor([0, 70, 70, 130])
with_empty, left_with = fixed_decay_attention(q, k, v, None, state=given, cu_seqlens=some, **options)
assert torch.equal(output, with_empty) and torch.equal(left, left_with[[0, 2]]) and torch.equal(left_with[1], given[1])

# Bounds may be written anew, and be those of inference mode, which do not tell that.
for inference in (False, True):
    with torch.inference_mode(inference):
        reused = torch.tensor([0, 70, 130])
        for bounds in ([0, 70, 130], [0, 100, 130]):
            reused.copy_(torch.tensor(bounds))
            again, _ = fixed_decay_attention(q, k, v, None, scale=0.3, cu_seqlens=reused)
            expected, _ = each_document(linear_attention_recurrence, (q, k, v, None), reused, state=None, scale=0.3)
            torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)
"""


def test_the_kernels_compute_the_recurrence():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("log_decay", "serves"),
    [
        (torch.tensor([-1.25, 0.0]), True),
        (torch.tensor([-2.0, 0.0]), False),
        (torch.zeros(1, 4, 2), False),
        (None, True),
    ],
)
def test_decays_that_the_kernels_compute(monkeypatch, log_decay, serves):
    """A stronger decay would overflow; one of the token, or a learnt one, is no fixed decay."""
    monkeypatch.setattr(fixed_decay, "_kernels_take", lambda q, v: True)
    x = torch.zeros(1, 4, 2, 16)
    assert fixed_decay.fixed_decay_serves(x, x, log_decay) is serves
    if log_decay is not None:
        assert not fixed_decay.fixed_decay_serves(x, x, log_decay.clone().requires_grad_())
