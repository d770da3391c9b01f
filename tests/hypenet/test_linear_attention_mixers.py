"""The mixers that are made of gated linear attention or gated slot attention, against their equations."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hypenet.cache import HypeNetCache
from hypenet.mixer_retnet import retnet_log_decay
from hypenet.transfer import hybrid_config, mixer_from_attention
from tests.hypenet.plain import EXACT, flat, normal
from tests.hypenet.sizes import SIZES

HEADS, DIM, HIDDEN, LAYERS = (SIZES[n] for n in ("num_attention_heads", "head_dim", "hidden_size", "num_hidden_layers"))


# The layers' equations, written out from their weights: each gives o_t before its norm and gate.


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotate(x, positions):
    """RoPE on [B, T, H, D], the halves of D being the real and imaginary parts."""
    frequencies = SIZES["rope_theta"] ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    angles = positions[..., None, None] * frequencies
    turned = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def of_heads(mixer, x, name):
    return (x @ getattr(mixer, name).weight.mT).unflatten(-1, (-1, DIM))


def qkv(mixer, x):
    q, k, v = (of_heads(mixer, x, name) for name in ("q_proj", "k_proj", "v_proj"))
    if mixer.q_norm is None:
        return q, k, v
    return rms_norm(q, mixer.q_norm.weight), rms_norm(k, mixer.k_norm.weight), v


def scan(q, k, v, decay):
    """S_t = decay_t S_(t-1) + k_t^T v_t, and q_t S_t / sqrt(D); decay [B or 1, T or 1, H, D or 1]."""
    decay, state, outputs = decay.expand(*q.shape[:3], -1), 0, []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None] @ state)[:, :, 0] / math.sqrt(DIM))
    return torch.stack(outputs, dim=1)


def plain_linear_attn(mixer, x, rope):
    q, k, v = qkv(mixer, x)
    q, k = (torch.where(y > 0, y + 1, y.exp()) for y in (q, k))
    return scan(rope(q), rope(k), v, torch.ones(1, 1, HEADS, 1))


def plain_retnet(mixer, x, rope):
    q, k, v = qkv(mixer, x)
    gamma = torch.tensor([31 / 32, 63 / 64, 127 / 128, 255 / 256], dtype=torch.float64)
    return scan(rope(q), rope(k), v, gamma[None, None, :, None])


def plain_gla(mixer, x, rope):
    q, k, v = qkv(mixer, x)
    logits = x @ mixer.gate_down.weight.mT @ mixer.gate_up.weight.mT + mixer.gate_bias
    return scan(rope(q), rope(k), v, torch.sigmoid(logits).pow(1 / 16).unflatten(-1, (HEADS, DIM)))


def plain_hgrn2(mixer, x, rope):
    q, k, v = qkv(mixer, x)
    beta = torch.sigmoid(mixer.lower_bound).view(HEADS, DIM)
    k = (1 - beta) * torch.sigmoid(k)
    return scan(rope(q * torch.sigmoid(q)), rope(k), v, 1 - k)


def plain_mamba2(mixer, x, rope):
    q, k, v = qkv(mixer, x)
    dt = torch.log(1 + torch.exp(x @ mixer.dt_proj.weight.mT + mixer.dt_bias))[..., None]
    alpha = torch.exp(-dt * mixer.A_log.exp()[:, None])
    return scan(rope(q), dt * rope(k), v, alpha) + mixer.D[:, None] * v


def plain_gsa(mixer, x, rope):
    q, k, v = qkv(mixer, x)
    q, k = rope(q), rope(k)
    alpha = torch.sigmoid(x @ mixer.f_proj.weight.mT).pow(1 / 8).unflatten(-1, (HEADS, 64))
    keys = values = 0
    outputs = []
    for t in range(x.shape[1]):
        q_t, k_t, v_t, a_t = (y[:, t] for y in (q, k, v, alpha))
        keys = keys * a_t[:, :, None, :] + k_t[:, :, :, None] * (1 - a_t)[:, :, None, :]
        values = values * a_t[:, :, :, None] + (1 - a_t)[:, :, :, None] * v_t[:, :, None, :]
        p_t = (q_t[:, :, None] @ keys / math.sqrt(DIM)).softmax(-1)
        outputs.append((p_t @ values)[:, :, 0])
    return torch.stack(outputs, dim=1)


PLAIN = {
    "linear-attn": plain_linear_attn,
    "retnet": plain_retnet,
    "gla": plain_gla,
    "hgrn2": plain_hgrn2,
    "mamba2": plain_mamba2,
    "gsa": plain_gsa,
}
OWN_PARAMETERS = {"gate_bias", "lower_bound", "dt_bias", "A_log", "D"}


def embeddings(positions):
    frequencies = SIZES["rope_theta"] ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    angles = (positions[..., None] * frequencies).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def run(mixer, x, positions=None, **kwargs):
    positions = torch.arange(x.shape[1])[None] if positions is None else positions
    cos, sin = (y.to(x.dtype) for y in embeddings(positions))
    return mixer(x, (cos, sin), **kwargs)[0]


@pytest.fixture(params=list(PLAIN))
def name(request):
    return request.param


@pytest.fixture
def make_mixer(make_hybrid):
    """A function from a mixer's name and options to its layer 0, in float64, its own parameters moved at random."""

    def make(name, options=None, **keys):
        model = make_hybrid(mixer_types=[name] * LAYERS, mixer_options={name: options or {}}, **keys)
        mixer = model.model.layers[0].self_attn.double()
        with torch.no_grad():
            for own, parameter in mixer.named_parameters():
                if own in OWN_PARAMETERS:
                    parameter += normal(*parameter.shape, seed=4)
        return mixer

    return make


@pytest.fixture
def x():
    return normal(2, 37, HIDDEN, seed=3)


def test_the_layer_is_its_equation(make_mixer, name, x):
    mixer, positions = make_mixer(name), torch.arange(37)[None]
    assert (mixer.q_norm is not None) == (name in ("linear-attn", "retnet", "gsa"))
    o = PLAIN[name](mixer, x, lambda y: rotate(y, positions))
    y = rms_norm(o.flatten(2), mixer.o_norm.weight) * torch.sigmoid(x @ mixer.z_proj.weight.mT)
    assert_close(run(mixer, x), y @ mixer.o_proj.weight.mT, **EXACT)


def test_shared_key_and_value_heads_are_cloned_ones(make_mixer, name, x):
    shared, expanded = make_mixer(name, expand_kv_proj=False), make_mixer(name)
    weights = shared.state_dict()
    for part in ("k_proj.weight", "v_proj.weight", "lower_bound"):
        if part in weights:
            weights[part] = weights[part].unflatten(0, (-1, DIM)).repeat_interleave(2, dim=0).flatten(0, 1)
    expanded.load_state_dict(weights)
    assert_close(run(shared, x), run(expanded, x), **EXACT)


def test_padding_leaves_no_trace(make_mixer, name, x):
    mixer = make_mixer(name)
    padded, mask = x.clone(), torch.ones(2, 37, dtype=torch.long)
    mask[0, :20] = 0
    padded[0, :20] = math.nan  # what stands in padding must not matter
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, alone = HypeNetCache(mixer.config), HypeNetCache(mixer.config)
    output = run(mixer, padded, positions, attention_mask=mask, past_key_values=cache)
    expected = run(mixer, x[:1, 20:], past_key_values=alone)
    assert_close(output[:1, 20:], expected, **EXACT)
    assert_close(output[1:], run(mixer, x[1:]), **EXACT)
    assert_close([s[:1] for s in flat(cache.state(0))], flat(alone.state(0)), **EXACT)


def test_a_cache_continues_the_sequence(make_mixer, name, x):
    mixer = make_mixer(name)
    cache, outputs = HypeNetCache(mixer.config), []
    for begin, end in ((0, 19), (19, 35), (35, 36), (36, 37)):
        positions = torch.arange(begin, end)[None]
        outputs.append(run(mixer, x[:, begin:end], positions, past_key_values=cache))
    assert_close(torch.cat(outputs, dim=1), run(mixer, x), **EXACT)
    assert cache.get_seq_length() == 37
    assert all(s.dtype == torch.float64 for s in flat(cache.state(0)))


def test_packed_documents_are_sequences_of_their_own(make_mixer, name, x):
    mixer, bounds = make_mixer(name), [0, 5, 6, 40, 74]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)]).view(2, 37)
    output = run(mixer, x, positions, cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32))
    alone = [run(mixer, x.flatten(0, 1)[None, a:b]) for a, b in pairwise(bounds)]
    assert_close(output.flatten(0, 1)[None], torch.cat(alone, dim=1), **EXACT)


def test_half_precision(make_mixer, name, x):
    mixer = make_mixer(name)
    expected = run(mixer, x)
    mixer.bfloat16()
    cache = HypeNetCache(mixer.config)
    output = run(mixer, x.bfloat16(), past_key_values=cache)
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() < 0.03 * expected.norm()
    assert all(s.dtype == torch.float32 for s in flat(cache.state(0)))
    output.float().square().sum().backward()
    for part, parameter in mixer.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), part


def test_every_part_can_be_left_out(make_mixer, name, x):
    options = {"use_rope": False, "qk_norm": None, "use_output_norm": False, "use_output_gate": False}
    mixer = make_mixer(name, options)
    assert not {"q_norm", "k_norm", "o_norm", "z_proj"} & dict(mixer.named_children()).keys()
    o = PLAIN[name](mixer, x, lambda y: y)
    assert_close(run(mixer, x), o.flatten(2) @ mixer.o_proj.weight.mT, **EXACT)


def test_hgrn2_forgets_at_most_what_its_bound_lets_it(make_mixer):
    """Where k rounds to one or to nothing, log f is still exact, and so is its gradient."""
    mixer = make_mixer("hgrn2").float()
    torch.nn.init.constant_(mixer.lower_bound, -30)
    logits = torch.tensor([-100, -20, 0, 20, 100.0])[:, None].expand(5, DIM).requires_grad_()
    keys = logits[None, :, None]
    _, _, log_forget = mixer.before_rope(torch.zeros_like(keys), keys)
    expected = torch.tensor([0, -math.exp(-20), -math.log(2), -20 + math.exp(-10), -30])
    assert_close(log_forget[0, :, 0, 0], expected, rtol=1e-5, atol=1e-30)
    log_forget.sum().backward()
    assert logits.grad.isfinite().all() and mixer.lower_bound.grad.isfinite().all()


# What the parameters of its own begin at.


@pytest.fixture(params=["new", "from attention"])
def fresh(request, teacher, make_hybrid):
    """A function from a mixer's name to layer 2, as a new model has it or as made from a teacher's attention."""

    def make(name):
        if request.param == "new":
            return make_hybrid(mixer_types=[name] * LAYERS).model.layers[2].self_attn
        torch.manual_seed(1)
        config = hybrid_config(teacher.config, [1, 3], rnn_mixer=name)
        return mixer_from_attention(teacher.model.layers[2].self_attn, config, 2)

    return make


def test_retnets_decays():
    assert_close(retnet_log_decay(3).exp(), torch.tensor([0.96875, 0.984375, 0.9921875]))
    many = retnet_log_decay(64)
    assert (many < 0).all() and many[40] == -(2.0**-45)  # 1 - 2^-45 is 1 in float32


def test_gla_begins_by_halving_in_16_tokens(fresh, make_mixer):
    mixer = fresh("gla")
    assert make_mixer("gla", {"gate_low_rank_dim": 3}).gate_down.weight.shape == (3, HIDDEN)
    assert mixer.gate_down.weight.shape == (16, HIDDEN) and mixer.gate_up.weight.shape == (HEADS * DIM, 16)
    assert not mixer.gate_bias.any()
    assert mixer.gate_down.weight.std() > 0.2 and mixer.gate_up.weight.std() > 0.2  # initializer_range is 0.3


def test_hgrn2_begins_with_bounds_that_grow_with_depth(fresh):
    mixer = fresh("hgrn2")
    assert_close(torch.sigmoid(mixer.lower_bound), torch.full([HEADS * DIM], 3 / 5))


def test_mamba2_begins_as_mamba2(fresh):
    mixer = fresh("mamba2")
    dt, a = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert ((dt > 0.999e-3) & (dt < 1.001e-1)).all() and ((a > 0.999) & (a < 16.001)).all()
    assert dt.unique().numel() == a.unique().numel() == HEADS
    assert_close(mixer.D.detach(), torch.ones(HEADS))


def test_gsa_has_64_slots(fresh, make_mixer):
    assert fresh("gsa").f_proj.weight.shape == (HEADS * 64, HIDDEN)
    assert make_mixer("gsa", {"slots": 5}).f_proj.weight.shape == (HEADS * 5, HIDDEN)


def test_a_teachers_projections_are_taken_over(teacher, name):
    attention, config = teacher.model.layers[2].self_attn, hybrid_config(teacher.config, [1, 3], rnn_mixer=name)
    mixer = mixer_from_attention(attention, config, 2)
    assert_close(mixer.q_proj.weight, attention.q_proj.weight)
    cloned = attention.k_proj.weight.unflatten(0, (-1, DIM)).repeat_interleave(2, dim=0).flatten(0, 1)
    assert_close(mixer.k_proj.weight, torch.nn.Parameter(cloned))


# Options.


def test_linear_attention_without_a_feature_map(make_mixer, x):
    mixer = make_mixer("linear-attn", {"feature_map": None})
    retnet = make_mixer("retnet")
    retnet.load_state_dict(mixer.state_dict())
    assert_close(run(mixer, x[:, :1]), run(retnet, x[:, :1]), **EXACT)  # no decay has been yet
    assert not torch.allclose(run(mixer, x), run(make_mixer("linear-attn"), x), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("gla", {"gate_logit_normalizer": 2}),
        ("gsa", {"gate_logit_normalizer": 2}),
        ("hgrn2", {"query_activation": None}),
    ],
)
def test_options_take_effect(make_mixer, x, name, option):
    assert not torch.allclose(run(make_mixer(name, option), x), run(make_mixer(name), x), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("linear-attn", {"feature_map": "relu"}, "feature_map must be 'elu' or None, not 'relu'"),
        ("hgrn2", {"query_activation": "sillu"}, "query_activation must be None or a name in .*, not 'sillu'"),
        ("mamba2", {"slots": 3}, r"mixer_options\['mamba2'\] has no slots; there are activation, head_dim"),
    ],
)
def test_options_that_do_not_exist_are_refused(make_mixer, name, option, message):
    with pytest.raises(ValueError, match=message):
        make_mixer(name, option)
