"""The weight transfer: what of the teacher arrives where."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, Qwen3Config

from hypenet.configuration_hypenet import ATTENTION
from hypenet.mixers import MIXERS
from hypenet.modeling_hypenet import HypeNetForCausalLM
from hypenet.rope import ROPE_BY_LENGTH, ROPE_TYPES, installed_rope
from hypenet.transfer import (
    TEACHERS,
    hybrid_config,
    hybrid_from_teacher,
    mixer_from_attention,
)
from tests.hypenet.sizes import SIZES

DIM = SIZES["head_dim"]
FAMILIES = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama with wide heads": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3 with biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
SWITCHES = {  # Table 3, and its combinations in Figure 4
    "lightning_use_rope": False,
    "attn_use_rope": True,
    "lightning_use_qk_norm": False,
    "expand_kv_proj": False,
    "lightning_use_output_gate": False,
    "lightning_use_output_norm": False,
    "attn_use_output_gate": False,
}


@pytest.fixture
def x():
    return torch.randn(2, 11, SIZES["hidden_size"], generator=torch.Generator().manual_seed(4))


def family_config(model_type, **keys):
    """Six heads over three, their width left to the family where `keys` do not say it."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    heads = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    return AutoConfig.for_model(model_type, **(sizes | heads | keys))


def rope_of_another_type():
    config = family_config("llama")
    config.rope_parameters = config.rope_scaling = {"rope_type": "spiral", "rope_theta": 10_000.0}
    return config


def make_teacher(family, **keys):
    """A teacher in which no bias is zero and no norm one."""
    torch.manual_seed(0)
    model_type, own = FAMILIES[family]
    teacher = AutoModelForCausalLM.from_config(family_config(model_type, **(own | keys)))
    for name, parameter in teacher.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return teacher.eval()


def test_hybrid_config_is_the_teachers_and_hypenets(teacher):
    config = hybrid_config(teacher.config, [1, 3], logits_scaling="hype 500")
    assert config.mixer_types == ["lightning-attn", "attn", "lightning-attn", "attn"]
    assert config.attn_logits_scaling == "hype 500"
    assert (config.model_type, config.architectures) == ("hypenet", None)
    assert (config.lightning_nh, config.lightning_nkv, config.lightning_head_dim) == (4, 4, 8)
    assert config.tie_word_embeddings
    for name in SIZES.keys() - {"rope_theta"}:
        assert getattr(config, name) == getattr(teacher.config, name)
    assert hybrid_config(teacher.config, []).attn_logits_scaling is None


@pytest.mark.parametrize("layers", [[4], [-1], [1, 1]])
def test_hybrid_config_refuses_layers_that_are_not_there(teacher, layers):
    with pytest.raises(ValueError, match="attention_layers must be distinct, from 0 to 3"):
        hybrid_config(teacher.config, layers)


def test_hybrid_config_takes_only_what_hypenet_knows():
    """And what a family has by another name, or not at all, in HypeNet's terms."""
    llama = hybrid_config(family_config("llama", pretraining_tp=2, quantization_config={"bits": 4}), [1]).to_dict()
    assert not llama.keys() & {"pretraining_tp", "mlp_bias", "quantization_config"}
    assert (llama["head_dim"], llama["attn_use_qk_norm"], llama["lightning_use_qk_norm"]) == (8, False, True)

    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    for model_type, keys in (("qwen2", window), ("qwen3", window), ("mistral", {"sliding_window": 8})):
        config = hybrid_config(family_config(model_type, **keys), [1, 3])
        assert (config.sliding_window, config.use_sliding_window) == (None, False)
        assert config.max_window_layers == Qwen3Config().max_window_layers
        assert config.layer_types == ["linear_attention", "full_attention"] * 2


@pytest.mark.parametrize(
    ("family", "biases"),
    [
        ("llama", (False, False)),
        ("llama with biases", (True, True)),
        ("mistral", (False, False)),
        ("qwen2", (True, False)),
        ("qwen3", (False, False)),
        ("qwen3 with biases", (True, True)),
    ],
)
def test_hybrid_config_has_biases_where_the_teacher_has_them(family, biases):
    model_type, keys = FAMILIES[family]
    config = hybrid_config(family_config(model_type, **keys), [])
    assert (config.attn_qkv_bias, config.attn_o_bias) == biases


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "The teacher is a 'gpt2'; supported: llama, mistral, qwen2, qwen3"),
        (family_config("llama", mlp_bias=True), "MLPs have biases"),
        (rope_of_another_type(), "RoPE is of type 'spiral'; supported: default, linear, dynamic, yarn"),
        (family_config("qwen2", num_key_value_heads=4), "6 heads are no multiple of its 4 key and value heads"),
        (family_config("qwen2", hidden_size=50), "hidden_size 50 is no multiple of its 6 heads"),
    ],
)
def test_hybrid_config_refuses_what_hypenet_cannot_represent(config, message):
    with pytest.raises(ValueError, match=message):
        hybrid_config(config, [0])


def test_hybrid_config_refuses_a_switch_that_is_not_there(teacher):
    with pytest.raises(ValueError, match="HypeNetConfig has no attn_use_rop, colour"):
        hybrid_config(teacher.config, [0], attn_use_rop=True, colour=1)


def test_every_family_and_every_rope_is_tested():
    assert {model_type for model_type, _ in FAMILIES.values()} == set(TEACHERS)
    assert set(ROPES) == set(ROPE_TYPES)
    assert set(ROPE_BY_LENGTH) < set(ROPE_TYPES)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", TEACHERS)
def test_rope_is_the_teachers(model_type, rope):
    """Cos and sin, exactly, within and beyond the length that scaling starts from; also after saving."""
    keys = {"head_dim": 8, "max_position_embeddings": 64, "rope_theta": SIZES["rope_theta"]}
    rope_keys = {"rope_type": rope, **ROPES[rope]}
    teacher = AutoModelForCausalLM.from_config(
        family_config(model_type, **installed_rope({"rope_parameters": rope_keys, **keys}))
    )
    config = hybrid_config(teacher.config, [0])
    for length in (12, 90):
        positions, x = torch.arange(length)[None], torch.zeros(1)
        for again in (config, type(config)(**config.to_dict())):
            ours = HypeNetForCausalLM(again).model.rotary_emb(x, positions)
            theirs = type(teacher.model.rotary_emb)(teacher.config)(x, positions)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lightning_layers_q_k_v_are_the_teachers(family):
    """In every head, before RoPE; and before QK-norm, which the teacher does not have, in an RNN layer at one."""
    teacher = make_teacher(family)
    attention, config = teacher.model.layers[2].self_attn, hybrid_config(teacher.config, [1])
    mixer = mixer_from_attention(attention, config, 2)
    x = torch.randn(2, 11, 48, generator=torch.Generator().manual_seed(4))
    ours, theirs = (
        [p(x).unflatten(-1, (-1, m.head_dim)) for p in (m.q_proj, m.k_proj, m.v_proj)] for m in (mixer, attention)
    )
    for head in range(6):
        assert torch.equal(ours[0][:, :, head], theirs[0][:, :, head])
        for name in (1, 2):
            torch.testing.assert_close(ours[name][:, :, head], theirs[name][:, :, head // 2])
    o = torch.randn(2, 11, 6 * mixer.head_dim)
    assert torch.equal(mixer.o_proj(o), attention.o_proj(o))
    for norm in ("q_norm", "k_norm"):
        in_teacher = getattr(attention, norm, None)
        expected = torch.ones(mixer.head_dim) if in_teacher is None else in_teacher.weight
        assert torch.equal(getattr(mixer, norm).weight, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixer_type", sorted(MIXERS.keys() - {ATTENTION}))
def test_every_mixer_starts_from_every_teacher(family, mixer_type):
    teacher = make_teacher(family)
    attention, config = teacher.model.layers[0].self_attn, hybrid_config(teacher.config, [1], rnn_mixer=mixer_type)
    mixer = mixer_from_attention(attention, config, 0)
    ours, theirs = mixer.state_dict(), attention.state_dict()
    for name in theirs.keys() & ours.keys():
        clones = ours[name].shape[0] // theirs[name].shape[0]
        by_head = theirs[name].unflatten(0, (-1, attention.head_dim))
        assert torch.equal(ours[name], by_head.repeat_interleave(clones, dim=0).flatten(0, 1)), name
    assert {f"{p}_proj.weight" for p in "qkvo"} <= theirs.keys() & ours.keys()
    assert theirs.keys() - ours.keys() <= {"q_norm.weight", "k_norm.weight"}
    hybrid = hybrid_from_teacher(teacher, config)
    assert hybrid(torch.arange(7)[None]).logits.isfinite().all()


def test_rnn_mixer_has_the_teachers_q_k_v_in_every_head(teacher, x):
    attention = teacher.model.layers[2].self_attn
    mixer = mixer_from_attention(attention, hybrid_config(teacher.config, []), 2)

    q, k, v, _ = mixer.project(x)
    q, k = mixer.normed(q, k)
    teacher_q = attention.q_norm(attention.q_proj(x).unflatten(-1, (-1, DIM)))
    teacher_k = attention.k_norm(attention.k_proj(x).unflatten(-1, (-1, DIM)))
    teacher_v = attention.v_proj(x).unflatten(-1, (-1, DIM))
    assert q.shape == k.shape == v.shape == (2, 11, 4, DIM)
    for head in range(4):
        torch.testing.assert_close(q[:, :, head], teacher_q[:, :, head])
        torch.testing.assert_close(k[:, :, head], teacher_k[:, :, head // 2])
        torch.testing.assert_close(v[:, :, head], teacher_v[:, :, head // 2])
    assert torch.equal(mixer.o_proj.weight, attention.o_proj.weight)
    assert torch.equal(mixer.o_norm.weight, torch.ones(32))
    assert mixer.z_proj.weight.std().item() == pytest.approx(SIZES["initializer_range"], rel=0.1)


def test_rnn_mixer_shares_no_memory_and_keeps_the_dtype(teacher):
    attention = teacher.bfloat16().model.layers[0].self_attn
    mixer = mixer_from_attention(attention, hybrid_config(teacher.config, []), 0)
    theirs = {p.data_ptr() for p in attention.parameters()}
    assert all(p.dtype == torch.bfloat16 and p.data_ptr() not in theirs for p in mixer.parameters())


def test_rnn_mixer_stands_in_the_teacher(teacher, tokens):
    """One-layer replacement: the teacher runs with it, and the layers before it are untouched."""
    before = teacher(tokens, output_hidden_states=True, use_cache=False).hidden_states
    config = hybrid_config(teacher.config, [])
    teacher.model.layers[2].self_attn = mixer_from_attention(teacher.model.layers[2].self_attn, config, 2)
    after = teacher(tokens, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(after[2], before[2])
    assert not torch.allclose(after[3], before[3], atol=1e-2)


def test_rnn_mixer_needs_an_rnn_layer_and_fitting_heads(teacher):
    attention = teacher.model.layers[1].self_attn
    with pytest.raises(ValueError, match="Layer 1 is an attention layer"):
        mixer_from_attention(attention, hybrid_config(teacher.config, [1]), 1)
    other = Qwen3Config(**{**SIZES, "head_dim": 16})
    with pytest.raises(ValueError, match=r"Layer 1: the teacher's heads are 8 wide, the mixer's 16"):
        mixer_from_attention(attention, hybrid_config(other, []), 1)
    more = Qwen3Config(**{**SIZES, "num_attention_heads": 6})
    with pytest.raises(ValueError, match=r"Layer 1: the teacher's .*q_proj.weight.* do not fit"):
        mixer_from_attention(attention, hybrid_config(more, []), 1)
    attention.scaling = 1.0
    with pytest.raises(ValueError, match=r"Layer 1: the teacher scales its logits by 1, HypeNet by 1/sqrt\(8\)"):
        mixer_from_attention(attention, hybrid_config(teacher.config, []), 1)


def test_only_norms_stay_behind():
    attention = make_teacher("qwen3 with biases").model.layers[0].self_attn
    config = family_config("qwen3", head_dim=16)
    with pytest.raises(ValueError, match=r"Layer 0: the teacher's .*q_proj.bias.* do not fit"):
        mixer_from_attention(attention, hybrid_config(config, []), 0)
    config = family_config("qwen3", head_dim=16, attention_bias=True)
    mixer = mixer_from_attention(attention, hybrid_config(config, [], lightning_use_qk_norm=False), 0)
    assert mixer.q_norm is None
    assert torch.equal(mixer.o_proj.bias, attention.o_proj.bias)


def test_biases_that_the_teacher_has_not_start_at_zero():
    attention = make_teacher("llama").model.layers[0].self_attn
    mixer = mixer_from_attention(attention, hybrid_config(family_config("llama", attention_bias=True), []), 0)
    assert not any(p.bias.any() for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj))
