"""Gated linear attention in every form of its decay, and gated slot attention: the forms of each agree."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hypenet.linear_attention import linear_attention, linear_attention_chunked, linear_attention_recurrence
from hypenet.mixer_gsa import gsa, gsa_chunked, gsa_recurrence
from tests.hypenet.plain import EXACT, flat, normal

LENGTHS = [1, 15, 16, 17, 70]
DECAYS = {"none": None, "head": (3,), "token": (2, 70, 3), "channel": (2, 70, 3, 6)}
STRENGTHS = ["mild", "strongest", "zero", "mixed"]


def decay_of(strength, *shape):
    """Log-decays: moderate ones, -50 a step, none, or these three in turn."""
    mild = F.logsigmoid(normal(*shape, seed=9))
    if strength == "mixed":
        kind = torch.arange(mild.numel()).view(shape) * 7 % 3
        return torch.where(kind == 0, mild, torch.where(kind == 1, -50.0, 0.0))
    return {"mild": mild, "strongest": torch.full_like(mild, -50), "zero": torch.zeros_like(mild)}[strength]


def with_gradients(form, inputs, state, **kwargs):
    """What `form` gives and the gradients of a loss on all of that."""
    wanted = flat(tuple(x for x in inputs if x is not None), state)
    for x in wanted:
        x.requires_grad_()
    results = flat(form(*inputs, state=state, **kwargs))
    loss = sum((x * torch.cos(torch.arange(x.numel())).view_as(x)).sum() + x.square().sum() for x in results)
    return results, torch.autograd.grad(loss, wanted)


def linear_inputs(decay, strength, length):
    q, k, v = (normal(2, length, 3, dim, seed=i) for i, dim in enumerate((6, 6, 10)))
    g = None if DECAYS[decay] is None else decay_of(strength, *DECAYS[decay])
    return (q, k, v, g if g is None or g.ndim == 1 else g[:, :length]), normal(2, 3, 6, 10, seed=5)


def slot_inputs(strength, length):
    q, k, v = (normal(2, length, 3, dim, seed=i) for i, dim in enumerate((6, 6, 10)))
    state = normal(2, 3, 6, 5, seed=5), normal(2, 3, 5, 10, seed=6)
    return (q, k, v, decay_of(strength, 2, length, 3, 5)), state


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_linear_attention_in_chunks_equals_its_recurrence(decay, strength, length):
    inputs, state = linear_inputs(decay, strength, length)
    expected, gradients = with_gradients(linear_attention_recurrence, inputs, state, scale=0.4)
    results, own = with_gradients(linear_attention_chunked, inputs, state, scale=0.4)
    assert_close(results, expected, rtol=0, atol=1e-10)
    assert_close(own, gradients, **EXACT)
    begun = linear_attention_chunked(*inputs, scale=0.4)
    assert_close(begun, linear_attention_recurrence(*inputs, scale=0.4), rtol=0, atol=1e-10)


@pytest.mark.parametrize("decay", DECAYS)
def test_linear_attention_in_two_calls_is_one(decay):
    (q, k, v, g), state = linear_inputs(decay, "mixed", 70)
    whole, final = linear_attention(q, k, v, g, scale=0.4, state=state, keep_state=True)
    outputs = []
    for part in (slice(0, 21), slice(21, 69), slice(69, 70)):
        decay_part = g if g is None or g.ndim == 1 else g[:, part]
        output, state = linear_attention(
            q[:, part], k[:, part], v[:, part], decay_part, scale=0.4, state=state, keep_state=True
        )
        outputs.append(output)
    assert_close((torch.cat(outputs, dim=1), state), (whole, final), rtol=0, atol=1e-10)


@pytest.mark.parametrize("decay", DECAYS)
def test_single_precision_holds_where_strong_and_weak_decays_meet(decay):
    inputs, state = linear_inputs(decay, "mixed", 70)
    exact = linear_attention_chunked(*inputs, scale=0.4, state=state)
    single = (x if x is None else x.float() for x in (*inputs, state))
    q, k, v, g, state = single
    for result, expected in zip(linear_attention_chunked(q, k, v, g, scale=0.4, state=state), exact, strict=True):
        assert result.dtype == torch.float32
        assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_slot_attention_in_chunks_equals_its_recurrence(strength, length):
    inputs, state = slot_inputs(strength, length)
    expected, gradients = with_gradients(gsa_recurrence, inputs, state, scale=0.4)
    results, own = with_gradients(gsa_chunked, inputs, state, scale=0.4)
    assert_close(results, expected, rtol=0, atol=1e-10)
    assert_close(own, gradients, **EXACT)
    begun = flat(gsa_chunked(*inputs, scale=0.4))
    assert_close(begun, flat(gsa_recurrence(*inputs, scale=0.4)), rtol=0, atol=1e-10)
    assert gsa(*inputs, scale=0.4)[1] is None


def test_slot_attention_in_two_calls_is_one():
    inputs, state = slot_inputs("mixed", 70)
    whole = gsa(*inputs, scale=0.4, state=state, keep_state=True)
    outputs = []
    for part in (slice(0, 21), slice(21, 69), slice(69, 70)):
        output, state = gsa(*(x[:, part] for x in inputs), scale=0.4, state=state, keep_state=True)
        outputs.append(output)
    assert_close(flat(torch.cat(outputs, dim=1), state), flat(whole), rtol=0, atol=1e-10)


def test_slots_are_weighted_means_of_what_they_took_in():
    """One key and value over and over fill every slot with it."""
    k, v = normal(1, 1, 3, 6).expand(1, 200, 3, 6), normal(1, 1, 3, 10).expand(1, 200, 3, 10)
    output, (keys, values) = gsa_chunked(k, k, v, decay_of("mild", 1, 200, 3, 5) - 0.1, scale=1.0)
    assert_close(keys, k[:, 0, :, :, None].expand_as(keys), rtol=1e-6, atol=1e-6)
    assert_close(values, v[:, 0, :, None].expand_as(values), rtol=1e-6, atol=1e-6)
    assert_close(output[:, -1], v[:, -1], rtol=1e-6, atol=1e-6)
