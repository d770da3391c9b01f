"""Sliding-window attention: the window is the same whoever makes the mask, and however many tokens come at a time."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from hypenet.cache import HypeNetCache
from hypenet.configuration_hypenet import HypeNetConfig
from hypenet.mixers import build_mixer
from tests.hypenet.sizes import SIZES

WINDOW = 5
KEYS = {"mixer_types": ["swa", "attn", "swa", "lightning-attn"], "mixer_options": {"swa": {"window": WINDOW}}}


@pytest.fixture
def model(make_hybrid):
    return make_hybrid(**KEYS, attn_logits_scaling="hype 16")


def make_mixer(layer=0, **options):
    """The mixer alone, in float64, as outside of a model."""
    torch.manual_seed(0)
    mixer_options = {"swa": {"window": WINDOW, **options}}
    mixer = build_mixer(HypeNetConfig(**SIZES, mixer_types=["swa"] * 4, mixer_options=mixer_options), layer)
    return mixer.double().eval()


def heads(length, count=4, batch=2):
    generator = torch.Generator().manual_seed(length + count)
    return torch.randn(batch, count, length, 8, generator=generator, dtype=torch.float64)


def plain(q, k, v, allowed):
    """Softmax attention over the `allowed` keys, [B, 1, T, S], and within the window: [B, T, H, D]."""
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    t = torch.arange(keys - queries, keys)[:, None]
    s = torch.arange(keys)
    allowed = allowed & (s <= t) & (s > t - WINDOW)
    weights = (q @ k.mT / math.sqrt(8)).masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num()
    return (weights @ v).transpose(1, 2)


def padding_mask(keys):
    """[2, 1, 1, S]: the first row has 4 tokens of padding on its left."""
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[0, ..., :4] = False
    return mask


def as_given(allowed, form):
    if form == "added":
        return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    return allowed


@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (3, 3), (9, 9), (11, 11), (27, 27), (30, 30), (1, 5), (1, 14), (4, 8), (13, 17), (20, 40)],
)
def test_the_window_is_applied_without_a_mask(queries, keys, implementation):
    mixer = make_mixer()
    mixer.config._attn_implementation = implementation
    q, k, v = heads(queries), heads(keys, 2), heads(keys + 1, 2)[:, :, 1:]
    output, _ = mixer.attend(q, k, v, None)
    expected = plain(q, k, v, torch.ones(1, dtype=torch.bool))
    # transformers' eager attention has its softmax in float32
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6 if implementation == "eager" else 1e-12)


@pytest.mark.parametrize("form", ["booleans", "added", "padding"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 14), (9, 9), (11, 11), (27, 27), (13, 40)])
def test_the_window_is_applied_on_top_of_a_mask(queries, keys, form):
    """Causal masks with padding, as a teacher makes them."""
    mixer = make_mixer()
    q, k, v = heads(queries), heads(keys, 2), heads(keys + 1, 2)[:, :, 1:]
    allowed = padding_mask(keys) & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    given = padding_mask(keys)[:, 0, 0] if form == "padding" else as_given(allowed, form)
    output, _ = mixer.attend(q, k, v, given)
    tokens = padding_mask(keys)[:, 0, 0, -queries:]
    torch.testing.assert_close(output[tokens], plain(q, k, v, allowed)[tokens], rtol=0, atol=1e-12)
    if form == "added":
        mixer.config._attn_implementation = "eager"
        eager, weights = mixer.attend(q, k, v, given)
        torch.testing.assert_close(eager[tokens], output[tokens], rtol=0, atol=1e-6)
        assert weights.shape == (2, 4, queries, min(keys, queries + WINDOW - 1))


@pytest.mark.parametrize("masked", [False, True])
def test_block_by_block_gradients_are_those_of_the_whole(masked):
    mixer, length = make_mixer(), 4 * WINDOW + 3
    gradients = []
    allowed = padding_mask(length) if masked else torch.ones(1, dtype=torch.bool)
    for attend in (lambda q, k, v: mixer.attend(q, k, v, allowed if masked else None)[0], None):
        inputs = [heads(length), heads(length, 2), heads(length + 1, 2)[:, :, 1:].clone()]
        for x in inputs:
            x.requires_grad_()
        output = attend(*inputs) if attend else plain(*inputs, allowed)
        tokens = padding_mask(length)[:, 0, 0] if masked else slice(None)
        gradients.append(torch.autograd.grad(output[tokens].square().sum(), inputs))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-11)


def test_long_sequences_need_no_square_of_memory():
    """262,144 tokens: a [T, T] mask alone would have 64 GiB."""
    q, k, v = torch.zeros(3, 1, 1, 2**18, 1)
    config = HypeNetConfig(**{**SIZES, "num_attention_heads": 1, "num_key_value_heads": 1}, mixer_types=["swa"] * 4)
    output, _ = build_mixer(config, 0).attend(q, k, v + 1, None)
    torch.testing.assert_close(output, torch.ones(1, 2**18, 1, 1))


def test_the_model_without_a_mask_is_the_model_with_one(model, tokens):
    """transformers' own mask against none: the layer's own window."""
    whole = model(tokens).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens).logits, whole, rtol=1e-4, atol=1e-4)


def test_it_rotates_and_never_scales(make_hybrid, tokens):
    only = {"mixer_types": ["swa"] * 4, "mixer_options": {"swa": {"window": WINDOW}}}
    plain = make_hybrid(**only)
    assert torch.equal(make_hybrid(**only, attn_logits_scaling="hype 2")(tokens).logits, plain(tokens).logits)
    assert plain.model.layers[0].self_attn.o_gate is None
    without = make_hybrid(**only | {"mixer_options": {"swa": {"window": WINDOW, "use_rope": False}}})
    assert not torch.allclose(without(tokens).logits, plain(tokens).logits, atol=1e-2)
    gated = make_hybrid(**only | {"mixer_options": {"swa": {"window": WINDOW, "use_output_gate": True}}})
    assert gated.model.layers[0].self_attn.o_gate.weight.shape == (32, 32)
    assert make_hybrid(mixer_types=["swa"] * 4).config.sliding_window == 512


def test_the_cache_keeps_a_window(model, tokens):
    cache = model(tokens, use_cache=True).past_key_values
    for layer in (0, 2):
        keys = cache.layers[layer].keys
        assert keys.shape == (2, 2, WINDOW - 1, 8)
        assert keys.untyped_storage().nbytes() == keys.nbytes
    assert cache.get_seq_length() == cache.get_seq_length(0) == 50


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_in_the_place_of_a_teachers_attention(attn_implementation, padded, tokens):
    """One-layer replacement, with the teacher's masks and the teacher's cache."""
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, attn_implementation=attn_implementation)
    dtype = torch.float64 if attn_implementation == "sdpa" else torch.float32  # eager attention's softmax
    teacher = Qwen3ForCausalLM(config).eval()
    teacher.model.layers[1].self_attn = make_mixer(layer=1)
    teacher.to(dtype)
    reference = Qwen3ForCausalLM(config).to(dtype).eval()
    reference.load_state_dict(teacher.state_dict())
    windowed = reference.model.layers[1].self_attn
    inner = windowed.forward

    def forward(*args, **kwargs):  # Qwen3's own attention, with the window in its mask
        band = torch.ones(50, 50, dtype=torch.bool).tril().triu(1 - WINDOW)[None, None]
        mask = kwargs["attention_mask"]
        if mask is None or mask.dtype == torch.bool:
            mask = band if mask is None else mask & band
        else:
            mask = mask.masked_fill(~band, torch.finfo(mask.dtype).min)
        return inner(*args, **kwargs | {"attention_mask": mask})

    windowed.forward = forward
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, : 13 * padded] = 0
    expected = reference(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]
    actual = teacher(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-5  # Qwen3's own norms compute in float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)

    cache, chunks = DynamicCache(), []
    for start, end in ((0, 20), (20, 37), (37, 49), (49, 50)):
        output = teacher(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        chunks.append(output.logits)
    torch.testing.assert_close(torch.cat(chunks, dim=1)[mask.bool()], actual, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_cannot_apply_the_window_is_refused():
    mixer = make_mixer()
    mixer.config._attn_implementation = "flex_attention"
    q, k, v = (heads(9, count).float() for count in (4, 2, 2))
    with pytest.raises(ValueError, match="Layer 0: flex_attention sees beyond the window of 5 without a mask"):
        mixer.attend(q, k, v, None)
    band = create_block_mask(lambda b, h, t, s: (s <= t) & (s > t - WINDOW), None, None, 9, 9, device="cpu")
    with torch.compiler.set_stance("force_eager"):  # compiling takes long
        output, _ = mixer.attend(q, k, v, band)
    torch.testing.assert_close(output, plain(q, k, v, torch.ones(1, dtype=torch.bool)), rtol=1e-4, atol=1e-5)


def test_flash_attention_is_told_the_window(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    told = {}

    def flash(module, q, k, v, attention_mask, **kwargs):
        told.update(kwargs)
        return q.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    mixer = make_mixer()
    mixer.config._attn_implementation = "flash_attention_2"
    mixer.attend(heads(9), heads(9, 2), heads(9, 2), None)
    assert told["sliding_window"] == WINDOW


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 1}, "window must be at least 2, not 1"), ({"widow": 3}, r"mixer_options\['swa'\] has no widow")],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_mixer(**options)


def test_it_takes_the_models_cache_alone():
    """Keys and values are the cache's last ones, in calls of one token and of several."""
    mixer = make_mixer()
    cache = HypeNetCache(mixer.config)
    x = torch.randn(1, 31, SIZES["hidden_size"], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rope = torch.randn(2, 1, 31, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    whole, _ = mixer(x, tuple(rope))
    parts = [
        mixer(x[:, a:b], tuple(rope[:, :, a:b]), past_key_values=cache)[0] for a, b in ((0, 3), (3, 4), (4, 7), (7, 31))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
