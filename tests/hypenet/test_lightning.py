"""Eq. 18 and 19: every form of Lightning Attention against the equation."""

import pytest
import torch

from hypenet.linear_attention import linear_attention, linear_attention_chunked, linear_attention_recurrence
from hypenet.mixer_lightning import alibi_slopes, lightning_log_decay

# Paper, Appendix A: gamma_h for H = 32.
PAPER_GAMMAS = """
0.4313237 0.4930687 0.5517813 0.60653067 0.6567524 0.7021885 0.74281985 0.7788008 0.81040263 0.83796686 0.86186993
0.8824969 0.9002237 0.91540533 0.9283695 0.9394131 0.94880116 0.95676816 0.96351933 0.9692332 0.97406423 0.97814524
0.9815902 0.9844964 0.98694694 0.98901224 0.99075234 0.99221796 0.993452 0.994491 0.99536544 0.9961014
"""


def random_inputs(batch=2, length=70, heads=3, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (normal(batch, length, heads, dim).requires_grad_() for _ in range(3))
    state = normal(batch, heads, dim, dim).requires_grad_()
    return q, k, v, lightning_log_decay(heads, dtype=torch.float64), state


def test_decay_is_the_papers():
    gammas = lightning_log_decay(32).exp()
    paper = torch.tensor([float(number) for number in PAPER_GAMMAS.split()])
    torch.testing.assert_close(gammas, paper, rtol=0, atol=1e-7)


def test_slopes_of_other_head_counts_interpolate_as_alibi_does():
    eighth, sixteenth = [2.0**-i for i in range(1, 9)], [2 ** (-i / 2) for i in range(1, 17)]
    expected = torch.tensor(eighth + sixteenth[0::2][:4])
    torch.testing.assert_close(alibi_slopes(12), expected)
    torch.testing.assert_close(alibi_slopes(1), torch.tensor([2.0**-8]))


def test_recurrence_is_the_sum_of_decayed_products():
    """o_t = scale sum_(s <= t) gamma^(t - s) (q_t . k_s) v_s, and gamma^(t + 1) q_t S_0 before it."""
    q, k, v, decay, state = random_inputs(length=9)
    output, final = linear_attention_recurrence(q, k, v, decay, scale=0.5, state=state)
    t = torch.arange(9, dtype=torch.float64)
    weights = torch.exp(decay[:, None, None] * (t[:, None] - t)).tril()
    expected = torch.einsum("bthd,bshd,hts,bshe->bthe", q, k, weights, v)
    expected = expected + torch.einsum("bthd,ht,bhde->bthe", q, torch.exp(decay[:, None] * (t + 1)), state)
    torch.testing.assert_close(output, 0.5 * expected, rtol=0, atol=1e-10)
    until_end = torch.exp(decay[:, None] * (8 - t))
    expected_final = torch.einsum("bthd,ht,bthe->bhde", k, until_end, v) + torch.exp(9 * decay)[:, None, None] * state
    torch.testing.assert_close(final, expected_final, rtol=0, atol=1e-10)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("length", "dim"), [(1, 8), (31, 8), (64, 8), (65, 8), (200, 8), (101, 40)])
def test_chunked_equals_recurrence(length, dim, with_state):
    q, k, v, decay, state = random_inputs(length=length, dim=dim)
    inputs = (q, k, v, state) if with_state else (q, k, v)
    results, gradients = [], []
    for form in (linear_attention_recurrence, linear_attention_chunked):
        output, final = form(q, k, v, decay, scale=dim**-0.5, state=state if with_state else None)
        results.append((output, final))
        loss = (output * torch.cos(torch.arange(output.numel()).view_as(output))).sum() + final.square().sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cut", [1, 32, 50])
def test_a_sequence_in_two_parts_is_the_sequence(cut):
    q, k, v, decay, state = random_inputs()
    whole, final = linear_attention_chunked(q, k, v, decay, scale=1.0, state=state)
    first, between = linear_attention_chunked(*(x[:, :cut] for x in (q, k, v)), decay, scale=1.0, state=state)
    second, end = linear_attention_chunked(*(x[:, cut:] for x in (q, k, v)), decay, scale=1.0, state=between)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(end, final, rtol=0, atol=1e-10)


def test_single_precision_holds_over_long_sequences():
    """The strongest decay of a large model, 0.43 a token, over 5,000 tokens: no overflow, no lost digits."""
    q, k, v, _, _ = random_inputs(batch=1, length=5000, heads=2, dim=32)
    decay = lightning_log_decay(32, dtype=torch.float64)[[0, -1]]
    exact, exact_final = linear_attention_chunked(q, k, v, decay, scale=32**-0.5)
    output, final = linear_attention_chunked(*(x.float() for x in (q, k, v)), decay.float(), scale=32**-0.5)
    torch.testing.assert_close(output.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final.double(), exact_final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 40])
def test_half_precision_keeps_its_state_in_float32(length):
    q, k, v, decay, _ = random_inputs(length=length, dtype=torch.bfloat16)
    output, final = linear_attention(q, k, v, decay.float(), scale=1.0, keep_state=True)
    assert output.dtype == torch.bfloat16
    assert final is not None and final.dtype == torch.float32
    expected, _ = linear_attention_recurrence(*(x.double() for x in (q, k, v)), decay, scale=1.0)
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("length", [1, 40])
def test_dispatch_equals_recurrence(length):
    q, k, v, decay, state = random_inputs(length=length)
    expected, expected_final = linear_attention_recurrence(q, k, v, decay, scale=0.3, state=state)
    output, final = linear_attention(q, k, v, decay, scale=0.3, state=state, keep_state=True)
    torch.testing.assert_close((output, final), (expected, expected_final), rtol=0, atol=1e-10)
    assert linear_attention(q, k, v, decay, scale=0.3)[1] is None
