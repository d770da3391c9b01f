"""Each mixer on the delta rule, and TTT, against its equation written out plainly."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from hypenet.cache import HypeNetCache
from hypenet.mixer_ttt import InnerNorm, ttt_chunked, ttt_recurrence
from hypenet.mixers import build_mixer
from hypenet.transfer import hybrid_config, mixer_from_attention
from tests.hypenet.plain import EXACT, delta_rule_plainly, normal
from tests.hypenet.sizes import SIZES

HEADS, DIM, HIDDEN = SIZES["num_attention_heads"], SIZES["head_dim"], SIZES["hidden_size"]
MIXERS = ["deltanet", "gdn", "kda", "rwkv7", "ttt"]


@pytest.fixture
def make_layers(make_hybrid):
    """A model in float64 whose layers 0 and 2 are of the mixer, with parameters of its own off their first values."""

    def make(name, **options):
        model = make_hybrid(mixer_types=[name, "attn"] * 2, mixer_options={name: options}).double()
        with torch.no_grad():
            for layer in (0, 2):
                mixer = model.model.layers[layer].self_attn
                for i, (key, parameter) in enumerate(mixer.named_parameters()):
                    if "proj" not in key and "norm" not in key:
                        parameter += 0.3 * normal(*parameter.shape, seed=i)
        return model

    return make


@pytest.fixture
def x():
    return normal(2, 37, HIDDEN, seed=5)


def run(model, x, positions, layer=2, **kwargs):
    embeddings = model.model.rotary_emb(x, positions)
    return model.model.layers[layer].self_attn(x, embeddings, **kwargs)[0]


def by_head(x):
    return x.unflatten(-1, (HEADS, DIM))


def rotate(model, x, length):
    """RoPE on [B, T, H, D], the halves of D being the real and imaginary parts."""
    cos, sin = (y[..., None, : DIM // 2] for y in model.model.rotary_emb(x, torch.arange(length)[None]))
    real, imaginary = x[..., : DIM // 2], x[..., DIM // 2 :]
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)


def projected(model, mixer, x, activation=F.silu, norm=lambda x: F.normalize(x, dim=-1)):
    q, k, v = (activation(by_head(proj(x))) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k = (rotate(model, norm(y), x.shape[1]) for y in (q, k))
    return q, k, v


def finished(mixer, o, z):
    o = o.flatten(2)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * mixer.o_norm.weight
    return mixer.o_proj(o * z)


def assert_layer_gives(model, x, expected):
    torch.testing.assert_close(run(model, x, torch.arange(x.shape[1])[None]), expected, **EXACT)


def deltanet_decay(mixer, x):
    return None


def gdn_decay(mixer, x):
    return -mixer.A_log.exp() * torch.log1p((mixer.a_proj(x) + mixer.dt_bias).exp())


def kda_decay(mixer, x):
    return -mixer.A_log.exp()[:, None] * torch.log1p((by_head(mixer.f_b_proj(mixer.f_a_proj(x))) + mixer.dt_bias).exp())


@pytest.mark.parametrize(
    ("name", "decay", "options", "most"),
    [
        ("deltanet", deltanet_decay, {}, 1),
        ("deltanet", deltanet_decay, {"negative_eigenvalues": True}, 2),
        ("gdn", gdn_decay, {}, 2),
        ("gdn", gdn_decay, {"negative_eigenvalues": False}, 1),
        ("kda", kda_decay, {}, 1),
        ("kda", kda_decay, {"gate_low_rank_dim": 3}, 1),
    ],
)
def test_delta_rule_layers(make_layers, x, name, decay, options, most):
    model = make_layers(name, **options)
    mixer = model.model.layers[2].self_attn
    q, k, v = projected(model, mixer, x)
    beta = most * torch.sigmoid(mixer.b_proj(x))
    state = torch.zeros(2, HEADS, DIM, DIM, dtype=torch.float64)
    o, _ = delta_rule_plainly(q, k, v, beta, decay(mixer, x), DIM**-0.5, state)
    assert_layer_gives(model, x, finished(mixer, o, torch.sigmoid(mixer.z_proj(x))))


def test_rwkv7_layer(make_layers, x):
    model = make_layers("rwkv7", decay_low_rank_dim=5, gate_low_rank_dim=3)
    mixer = model.model.layers[2].self_attn
    r, k, v = projected(model, mixer, x, activation=lambda x: x, norm=lambda x: x)
    (w_1, w_2), (a_1, a_2), (g_1, g_2) = (
        [module.weight for module in proj if isinstance(module, torch.nn.Linear)]
        for proj in (mixer.w_proj, mixer.a_proj, mixer.z_proj)
    )
    assert (w_1.shape, a_1.shape, g_1.shape) == ((5, HIDDEN), (5, HIDDEN), (3, HIDDEN))
    w = by_head(torch.exp(-math.exp(-0.5) * torch.sigmoid(torch.tanh(x @ w_1.T) @ w_2.T + mixer.w_0)))
    rate = by_head(torch.sigmoid(x @ a_1.T @ a_2.T + mixer.a_0))
    kappa = F.normalize(k * by_head(mixer.k_k), dim=-1)
    written = k * (1 + (rate - 1) * by_head(mixer.k_a))
    state, outputs = torch.zeros(2, HEADS, DIM, DIM, dtype=torch.float64), []
    for t in range(37):
        transition = torch.diag_embed(w[:, t]) - (kappa * rate)[:, t, :, :, None] * kappa[:, t, :, None, :]
        state = transition @ state + written[:, t, :, :, None] * v[:, t, :, None, :]
        bonus = (r * by_head(mixer.r_k) * written)[:, t].sum(-1, keepdim=True) * v[:, t]
        outputs.append((r[:, t, :, None, :] @ state)[:, :, 0] + bonus)
    z = torch.sigmoid(x @ g_1.T) @ g_2.T
    assert_layer_gives(model, x, finished(mixer, torch.stack(outputs, dim=1), z))


def test_rwkv7_without_its_gate(make_layers, x):
    mixer = make_layers("rwkv7", use_output_gate=False).model.layers[0].self_attn
    output = torch.randn(*x.shape[:-1], mixer.o_proj.in_features, dtype=x.dtype)
    assert mixer.z_proj is None
    assert torch.equal(mixer.norm_and_gate(output, None), mixer.o_norm(output))


@pytest.mark.parametrize("size", [16, 5, 1, 100])
def test_ttt_layer(make_layers, x, size):
    """The gradients by autograd, all tokens of a mini-batch at the W and b of its beginning."""
    model = make_layers("ttt", mini_batch_size=size, base_lr=3.0)
    mixer = model.model.layers[2].self_attn
    q, k, v = projected(model, mixer, x, activation=lambda x: x)
    eta = 3.0 / DIM * torch.sigmoid(mixer.lr_proj(x) + mixer.lr_bias)

    def norm(z):
        centred = z - z.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.ln_weight + mixer.ln_bias

    w, b = mixer.W_0.detach().expand(2, -1, -1, -1), mixer.b_0.detach().expand(2, -1, -1)
    outputs = []
    for t in range(37):
        if t % size == 0:
            w_t, b_t = w, b
        z = (torch.einsum("bhd,bhde->bhe", k[:, t], w) + b).detach().requires_grad_()
        (gradient,) = torch.autograd.grad((k[:, t] + norm(z) - v[:, t]).square().sum() / 2, z)
        step = eta[:, t, :, None] * gradient
        w_t, b_t = w_t - k[:, t, :, :, None] * step[:, :, None, :], b_t - step
        outputs.append(q[:, t] + norm(torch.einsum("bhd,bhde->bhe", q[:, t], w_t) + b_t))
        if t % size == size - 1:
            w, b = w_t, b_t
    expected = finished(mixer, torch.stack(outputs, dim=1), torch.sigmoid(mixer.z_proj(x)))
    assert_layer_gives(model, x, expected)


@pytest.mark.parametrize("filled", [0, 3])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 23])
def test_ttt_chunked_equals_recurrence(length, filled):
    """Mini-batches of 5, the first of which `filled` tokens have opened before."""
    q, k, v = normal(3, 2, length, 3, 8)
    eta = torch.sigmoid(normal(2, length, 3, seed=1)) / 8
    weight, bias = normal(2, 3, 8, seed=2)
    learned = normal(2, 3, 8, 8, seed=3), normal(2, 3, 8, seed=4)
    sums = 0.1 * filled * normal(2, 3, 8, 8, seed=5), 0.1 * filled * normal(2, 3, 8, seed=6)
    wanted = [x.requires_grad_() for x in (q, k, v, eta, weight, bias, *learned, *sums)]
    ln, state, results = InnerNorm(weight, bias, 1e-6), (*learned, *sums, torch.full([2], filled)), []
    for output, final in (
        ttt_recurrence(q, k, v, eta, None, ln, 5, state),
        ttt_chunked(q, k, v, eta, ln, 5, state),
    ):
        loss = output.sin().sum() + sum((x * torch.cos(torch.arange(x.numel())).view_as(x)).sum() for x in final[:-1])
        results.append((output, *final, *torch.autograd.grad(loss, wanted)))
    torch.testing.assert_close(results[1], results[0], **EXACT)
    assert (results[0][5] == (filled + length) % 5).all()


def test_ttt_chunked_has_the_gradients_of_the_recurrence(make_layers, x):
    """Padding that is none makes no difference; a row with padding goes token by token."""
    model, positions = make_layers("ttt"), torch.arange(37)[None]
    mixer = model.model.layers[2].self_attn
    padded, mask = torch.cat([x, x[:1]]), torch.ones(3, 37, dtype=torch.bool)
    mask[2, :3] = False
    gradients = []
    for output in (run(model, x, positions), run(model, padded, positions, attention_mask=mask)[:2]):
        gradients.append(torch.autograd.grad(output.sin().sum(), list(mixer.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0], **EXACT)


@pytest.mark.parametrize("name", MIXERS)
def test_left_padding_leaves_no_trace(make_layers, x, name):
    model = make_layers(name)
    padded, mask = x.clone(), torch.ones(2, 37, dtype=torch.long)
    mask[0, :20] = 0
    padded[0, :20] = math.nan  # what stands in padding must not matter
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, alone = HypeNetCache(model.config), HypeNetCache(model.config)
    output = run(model, padded, positions, attention_mask=mask, past_key_values=cache)
    expected = run(model, x[:1, 20:], torch.arange(17)[None], past_key_values=alone)
    torch.testing.assert_close(output[:1, 20:], expected, **EXACT)
    torch.testing.assert_close(output[1:], run(model, x[1:], torch.arange(37)[None]), **EXACT)

    more = run(model, x[:, :9], positions[:, -1:] + torch.arange(1, 10), past_key_values=cache)
    expected = run(model, x[:1, :9], torch.arange(17, 26)[None], past_key_values=alone)
    torch.testing.assert_close(more[:1], expected, **EXACT)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("cuts", [[1, 2, 3], [16, 32], [5, 20, 21, 30]])
def test_any_split_into_calls_is_one_call(make_layers, x, name, cuts):
    model = make_layers(name)
    whole, split = HypeNetCache(model.config), HypeNetCache(model.config)
    expected = run(model, x, torch.arange(37)[None], past_key_values=whole)
    outputs = []
    for begin, end in pairwise([0, *cuts, 37]):
        positions = torch.arange(begin, end)[None]
        outputs.append(run(model, x[:, begin:end], positions, past_key_values=split))
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, **EXACT)
    torch.testing.assert_close(split.state(2), whole.state(2), **EXACT)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_documents_are_each_alone(make_layers, x, name):
    model, bounds = make_layers(name), [0, 10, 11, 37]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])[None]
    output = run(model, x[:1], positions, cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32))
    for begin, end in pairwise(bounds):
        alone = run(model, x[:1, begin:end], torch.arange(end - begin)[None])
        torch.testing.assert_close(output[:, begin:end], alone, **EXACT)


@pytest.mark.parametrize("name", MIXERS)
def test_a_layer_trains_in_bfloat16(make_layers, x, name):
    model = make_layers(name).bfloat16()
    mixer, cache = model.model.layers[2].self_attn, HypeNetCache(model.config)
    output = run(model, x.bfloat16(), torch.arange(37)[None], past_key_values=cache)
    assert output.dtype == torch.bfloat16
    state = cache.state(2)
    assert all(part.dtype in (torch.float32, torch.long) for part in (state if isinstance(state, tuple) else [state]))
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


# First values


@pytest.fixture(params=["new", "converted"])
def make_first(request, make_hybrid, teacher):
    """Layer 2 of a new model, which transformers has initialised, or of one that is made from a teacher."""

    def make(name):
        if request.param == "new":
            return make_hybrid(mixer_types=["attn", "attn", name, "attn"]).model.layers[2].self_attn
        config = hybrid_config(teacher.config, [0, 1, 3], rnn_mixer=name)
        return mixer_from_attention(teacher.model.layers[2].self_attn, config, 2)

    return make


@pytest.mark.parametrize(("name", "least", "shape"), [("gdn", 0, [HEADS]), ("kda", 1, [HEADS, DIM])])
def test_first_decays(make_first, name, least, shape):
    mixer = make_first(name)
    rates, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert list(rates.shape) == [HEADS] and list(dt.shape) == shape
    assert (rates > least - 1e-5).all() and (rates < 16 + 1e-4).all() and rates.std() > 0
    assert (dt > 1e-3 - 1e-7).all() and (dt < 0.1 + 1e-6).all() and dt.std() > 0


def test_first_values_of_rwkv7(make_first):
    mixer, width = make_first("rwkv7"), HEADS * DIM
    assert (mixer.k_a == 1.02).all() and (mixer.r_k == -0.04).all()
    w_0, a_0, k_k = [], [], []
    for n in range(width):
        linear, zigzag = n / (width - 1) - 0.5, (n % DIM - (DIM - 1) / 2) / ((DIM - 1) / 2)
        zigzag *= abs(zigzag)
        w_0.append(-6 + 6 * (n / (width - 1)) ** (1 + (2 / 3) ** 0.3) + 0.5 + 2.5 * zigzag)
        a_0.append(-0.19 + 0.3 * zigzag + 0.4 * linear)
        k_k.append(0.71 - 0.1 * linear)
    for parameter, expected in ((mixer.w_0, w_0), (mixer.a_0, a_0), (mixer.k_k, k_k)):
        torch.testing.assert_close(parameter.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_first_values_of_ttt(make_first):
    mixer = make_first("ttt")
    assert list(mixer.W_0.shape) == [HEADS, DIM, DIM] and 0.017 < mixer.W_0.std() < 0.023
    assert (mixer.ln_weight == 1).all()
    assert not any(x.any() for x in (mixer.b_0, mixer.ln_bias, mixer.lr_bias))


def test_ttt_refuses_empty_mini_batches(make_hybrid):
    with pytest.raises(ValueError, match="mini_batch_size must be at least 1, not 0"):
        make_hybrid(mixer_types=["ttt", "attn"] * 2, mixer_options={"ttt": {"mini_batch_size": 0}})


def test_rwkv7_of_one_layer(make_hybrid):
    """Its first values depend on how deep among the others a layer is."""
    config = make_hybrid(num_hidden_layers=1, mixer_types=["rwkv7"]).config
    assert build_mixer(config, 0).w_0.isfinite().all()
