"""Eq. 17 and 18 written out once more, plainly, against the mixers."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from hypenet.cache import HypeNetCache
from hypenet.configuration_hypenet import hype_scaling
from hypenet.mixer_attention import logits_scale
from hypenet.mixers import MIXERS, build_mixer
from tests.hypenet.sizes import SIZES

HEADS, DIM = SIZES["num_attention_heads"], SIZES["head_dim"]


def rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, eps=1e-6)


def rotate(x, positions):
    """RoPE on [B, T, H, D], the halves of D being the real and imaginary parts."""
    frequencies = SIZES["rope_theta"] ** (-torch.arange(0, DIM, 2) / DIM)
    turn = torch.polar(torch.ones(()), positions[..., None, None] * frequencies)
    turned = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def heads_of(mixer, x, name):
    return getattr(mixer, name)(x).unflatten(-1, (-1, DIM))


@pytest.fixture
def x():
    return torch.randn(2, 37, SIZES["hidden_size"], generator=torch.Generator().manual_seed(3))


def run(model, layer, x, positions, **kwargs):
    mixer = model.model.layers[layer].self_attn
    embeddings = model.model.rotary_emb(x, positions)
    return mixer(hidden_states=x, position_embeddings=embeddings, position_ids=positions, **kwargs)[0]


def test_lightning_layer_is_eq_18(hybrid, x):
    mixer, positions = hybrid.model.layers[0].self_attn, torch.arange(37)[None]
    q, k, v = (heads_of(mixer, x, name) for name in ("q_proj", "k_proj", "v_proj"))
    q = rotate(rms_norm(q, mixer.q_norm.weight), positions)
    k = rotate(rms_norm(k, mixer.k_norm.weight), positions) / math.sqrt(DIM)
    gamma = torch.tensor([math.exp(-(2 ** (-8 * h / HEADS))) for h in range(1, HEADS + 1)])
    state, outputs = torch.zeros(2, HEADS, DIM, DIM), []
    for t in range(37):
        state = gamma[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state).flatten(1))
    o = rms_norm(torch.stack(outputs, dim=1), mixer.o_norm.weight)
    expected = mixer.o_proj(o * torch.sigmoid(mixer.z_proj(x)))
    torch.testing.assert_close(run(hybrid, 0, x, positions), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_layer_is_eq_17(make_hybrid, x, implementation):
    a = 16
    hybrid = make_hybrid(attn_logits_scaling=f"hype {a}")
    hybrid.set_attn_implementation(implementation)
    mixer, positions = hybrid.model.layers[1].self_attn, torch.arange(100, 137)[None]
    q, k, v = (heads_of(mixer, x, name).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    q, k = rms_norm(q, mixer.q_norm.weight), rms_norm(k, mixer.k_norm.weight)
    k, v = (y.repeat_interleave(HEADS // SIZES["num_key_value_heads"], dim=1) for y in (k, v))
    causal = torch.ones(37, 37, dtype=torch.bool).tril()

    def attention(scale):
        logits = (scale[:, None] * (q @ k.mT) / math.sqrt(DIM)).masked_fill(~causal, -math.inf)
        o = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return mixer.o_proj(o * torch.sigmoid(mixer.o_gate(x)))

    mask = torch.zeros(1, 1, 37, 37).masked_fill(~causal, -math.inf)
    s = torch.tensor([math.log(t + a) / math.log(a) for t in range(100, 137)])
    scaled = run(hybrid, 1, x, positions, attention_mask=mask)
    torch.testing.assert_close(scaled, attention(s), rtol=1e-4, atol=1e-5)

    hybrid.train()  # Eq. 11 is for inference
    torch.testing.assert_close(
        run(hybrid, 1, x, positions, attention_mask=mask), attention(torch.ones(37)), rtol=1e-4, atol=1e-5
    )
    hybrid.eval()
    hybrid.config.attn_logits_scaling = None  # a live model follows its configuration
    torch.testing.assert_close(
        run(hybrid, 1, x, positions, attention_mask=mask), attention(torch.ones(37)), rtol=1e-4, atol=1e-5
    )


def test_logits_scale():
    positions = torch.tensor([[0, 500, 249_500]])
    expected = torch.tensor([[1.0, math.log(1000, 500), 2.0]])
    assert (hype_scaling(500.0), hype_scaling(512.5)) == ("hype 500", "hype 512.5")
    torch.testing.assert_close(logits_scale(positions, hype_scaling(500)), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits_scale(positions, 1.25), torch.full((1, 3), 1.25))


@pytest.mark.parametrize("spec", ["hype", "hype 1", "hype x", "hypo 500", "500", ""])
def test_logits_scale_refuses(spec):
    with pytest.raises(ValueError, match="attn_logits_scaling must be"):
        logits_scale(torch.arange(3), spec)


def test_scaling_without_positions_is_an_error(hybrid, x):
    embeddings = hybrid.model.rotary_emb(x, torch.arange(37)[None])
    with pytest.raises(ValueError, match="needs position_ids"):
        hybrid.model.layers[1].self_attn(x, embeddings)


@pytest.mark.parametrize(
    ("part", "modules"),
    [("rope", set()), ("qk_norm", {"q_norm", "k_norm"}), ("output_norm", {"o_norm"}), ("output_gate", {"z_proj"})],
)
def test_each_part_of_the_rnn_layer_can_be_left_out(make_hybrid, hybrid, x, part, modules):
    without, positions = make_hybrid(**{f"lightning_use_{part}": False}), torch.arange(37)[None]
    without.load_state_dict(hybrid.state_dict(), strict=False)
    gone = {name.split(".")[-2] for name in hybrid.state_dict().keys() - without.state_dict().keys()}
    assert (
        gone
        == {"rope": set(), "qk_norm": {"q_norm", "k_norm"}, "output_norm": {"o_norm"}, "output_gate": {"z_proj"}}[part]
    )
    assert not torch.allclose(run(without, 0, x, positions), run(hybrid, 0, x, positions), atol=1e-3)


def test_shared_kv_heads_are_cloned_ones(make_hybrid, x):
    """expand_kv_proj off: RNN layers share keys and values as attention layers do."""
    shared, expanded, positions = make_hybrid(expand_kv_proj=False), make_hybrid(), torch.arange(37)[None]
    weights = shared.state_dict()
    for i in (0, 2):
        for name in (f"model.layers.{i}.self_attn.{n}_proj.weight" for n in "kv"):
            weights[name] = weights[name].unflatten(0, (-1, DIM)).repeat_interleave(2, dim=0).flatten(0, 1)
    expanded.load_state_dict(weights)
    torch.testing.assert_close(run(shared, 0, x, positions), run(expanded, 0, x, positions))


def test_padding_leaves_no_trace_in_the_state(hybrid, x):
    padded, cache, alone = x.clone(), HypeNetCache(hybrid.config), HypeNetCache(hybrid.config)
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[0, :20] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded[0, :20] = math.nan  # what stands in padding must not matter
    output = run(hybrid, 0, padded, positions, attention_mask=mask, past_key_values=cache)
    expected = run(hybrid, 0, x[:1, 20:], torch.arange(17)[None], past_key_values=alone)
    torch.testing.assert_close(output[:1, 20:], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.state(0)[:1], alone.state(0), rtol=1e-4, atol=1e-5)


def test_an_attention_mask_tells_an_rnn_layer_its_padding(hybrid, x):
    """In a teacher, an RNN layer gets the mask that was made for attention."""
    positions, padding = torch.arange(37)[None], torch.ones(2, 37, dtype=torch.bool)
    padding[0, :20] = False
    allowed = padding[:, None, None, :] & torch.ones(37, 37, dtype=torch.bool).tril()
    added = torch.zeros(2, 1, 37, 37).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = run(hybrid, 0, x, positions, attention_mask=padding)
    for mask in (allowed, added):
        torch.testing.assert_close(run(hybrid, 0, x, positions, attention_mask=mask), expected)


def test_an_rnn_layer_refuses_another_cache(hybrid, x):
    with pytest.raises(ValueError, match="needs a HypeNetCache"):
        run(hybrid, 0, x, torch.arange(37)[None], past_key_values=DynamicCache())


def test_unknown_mixer_is_named(hybrid):
    hybrid.config.mixer_types[2] = "lightening-attn"
    with pytest.raises(ValueError, match=r"mixer_types\[2\] is 'lightening-attn'; there are attn, .*lightning-attn"):
        build_mixer(hybrid.config, 2)
    assert set(MIXERS) >= {"attn", "lightning-attn"}
