"""The delta rule's forms against its equation."""

import pytest
import torch
import torch.nn.functional as F

from hypenet.delta_rule import delta_rule, delta_rule_chunked, delta_rule_recurrence, rwkv7
from tests.hypenet.plain import EXACT, delta_rule_plainly, normal


def random_inputs(length=70, decay="channel", strength=1.0, batch=2, heads=3, dim=8, value_dim=5):
    """q, k, v, a, b, log_decay and a state."""
    q, k, a, b = normal(4, batch, length, heads, dim)
    v = normal(batch, length, heads, value_dim, seed=1)
    shape = {"none": None, "head": (batch, length, heads), "channel": (batch, length, heads, dim)}[decay]
    g = None if shape is None else -strength * normal(*shape, seed=2).abs()
    return q, k, v, 0.3 * a, 0.3 * b, g, normal(batch, heads, dim, value_dim, seed=3)


def by_equation(q, k, v, a, b, g, scale, state):
    """F_t made whole, as Eq. 5 has it."""
    outputs = []
    for t in range(q.shape[1]):
        decay = torch.ones_like(k[:, t]) if g is None else g[:, t].exp().view(*g.shape[:1], g.shape[2], -1)
        transition = torch.diag_embed(decay.expand_as(k[:, t])) + b[:, t, :, :, None] * a[:, t, :, None, :]
        state = transition @ state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, None, :] @ state)[:, :, 0])
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_recurrence_is_the_equation(decay):
    *inputs, state = random_inputs(9, decay)
    expected = by_equation(*inputs, 0.5, state)
    torch.testing.assert_close(delta_rule_recurrence(*inputs, scale=0.5, state=state), expected, rtol=0, atol=1e-12)


def assert_chunked_equals_recurrence(*inputs, state):
    inputs = [x if x is None else x.requires_grad_() for x in (*inputs, state)]
    wanted = [x for x in inputs if x is not None]
    results = []
    for form in (delta_rule_recurrence, delta_rule_chunked):
        output, final = form(*inputs[:-1], scale=0.5, state=inputs[-1])
        loss = (output * torch.cos(torch.arange(output.numel()).view_as(output))).sum() + final.sin().sum()
        results.append((output, final, *torch.autograd.grad(loss, wanted)))
    torch.testing.assert_close(results[1], results[0], **EXACT)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 70])
def test_chunked_equals_recurrence(length, decay):
    *inputs, state = random_inputs(length, decay)
    assert_chunked_equals_recurrence(*inputs, state=state)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_extreme_decays(decay):
    """Nothing kept, all kept, and one after the other."""
    *inputs, g, state = random_inputs(70, decay)
    g[:, ::3] = -50
    g[:, 1::3] = 0
    assert_chunked_equals_recurrence(*inputs, g, state=state)
    for everywhere in (0.0, -50.0):
        assert_chunked_equals_recurrence(*inputs, torch.full_like(g, everywhere), state=state)


def test_single_precision_neither_overflows_nor_loses_digits():
    q, k, v, _, _, g, state = random_inputs(500, strength=30.0)
    k, beta = F.normalize(k, dim=-1), 2 * torch.sigmoid(normal(2, 500, 3, seed=4))
    for decay in (None, g[..., 0] / 100, g[..., 0], g / 100, g):
        exact = delta_rule(q, k, v, beta, decay, scale=0.5, state=state, keep_state=True)
        inputs = [None if x is None else x.float() for x in (q, k, v, beta, decay)]
        single = delta_rule(*inputs, scale=0.5, state=state.float(), keep_state=True)
        torch.testing.assert_close([x.double() for x in single], list(exact), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("cut", [1, 16, 37])
def test_a_sequence_in_two_parts_is_the_sequence(cut, decay):
    *inputs, state = random_inputs(70, decay)
    whole, final = delta_rule_chunked(*inputs, scale=1.0, state=state)
    first, between = delta_rule_chunked(*(None if x is None else x[:, :cut] for x in inputs), scale=1.0, state=state)
    second, end = delta_rule_chunked(*(None if x is None else x[:, cut:] for x in inputs), scale=1.0, state=between)
    torch.testing.assert_close((torch.cat([first, second], dim=1), end), (whole, final), rtol=0, atol=1e-10)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("length", [1, 40])
def test_delta_rule_and_its_gradients(length, decay):
    q, k, v, _, _, g, state = random_inputs(length, decay)
    beta = 2 * torch.sigmoid(normal(2, length, 3, seed=4))
    inputs = [x if x is None else x.requires_grad_() for x in (q, F.normalize(k, dim=-1), v, beta, g, state)]
    *sequence, state = inputs
    results = []
    for output, final in (
        delta_rule_plainly(*sequence, 0.5, state),
        delta_rule(*sequence, scale=0.5, state=state, keep_state=True),
    ):
        gradients = torch.autograd.grad(output.sin().sum() + final.cos().sum(), [x for x in inputs if x is not None])
        results.append((output, final, *gradients))
    torch.testing.assert_close(results[1], results[0], **EXACT)
    assert delta_rule(*sequence, scale=0.5)[1] is None


@pytest.mark.parametrize("length", [1, 40])
def test_half_precision_keeps_its_state_in_float32(length):
    q, k, v, a, b, g, state = random_inputs(length)
    k, beta = F.normalize(k, dim=-1), torch.sigmoid(normal(2, length, 3, seed=4))
    half = [x.bfloat16() for x in (q, k, v, a, b)]
    for output, final in (
        delta_rule(*half[:3], beta.bfloat16(), g.float(), scale=0.5, state=state.float(), keep_state=True),
        rwkv7(*half, g.float(), scale=0.5, state=state.float(), keep_state=True),
    ):
        assert (output.dtype, final.dtype) == (torch.bfloat16, torch.float32)
