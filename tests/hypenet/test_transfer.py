"""The weight transfer: what of the teacher arrives where."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config, Qwen3ForCausalLM

from hypenet.transfer import hybrid_config, hybrid_from_teacher, mixer_from_attention
from tests.hypenet.sizes import SIZES

DIM = SIZES["head_dim"]


@pytest.fixture
def x():
    return torch.randn(2, 11, SIZES["hidden_size"], generator=torch.Generator().manual_seed(4))


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


def test_hybrid_config_refuses_another_architecture():
    with pytest.raises(ValueError, match="must be of the Qwen3 architecture, not 'llama'"):
        hybrid_config(LlamaConfig(), [0])


def test_rnn_mixer_has_the_teachers_q_k_v_in_every_head(teacher, x):
    attention = teacher.model.layers[2].self_attn
    mixer = mixer_from_attention(attention, hybrid_config(teacher.config, []), 2)

    q, k, v = mixer.project(x)
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
    with pytest.raises(ValueError, match=r"Layer 1: the teacher's .*q_proj.weight.* do not fit"):
        mixer_from_attention(attention, hybrid_config(other, []), 1)


@pytest.mark.parametrize("tied", [True, False])
def test_all_attention_with_rope_and_without_gate_is_the_teacher(tokens, tied):
    teacher = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied)).eval()
    config = hybrid_config(teacher.config, range(4))
    config.attn_use_rope, config.attn_use_output_gate = True, False
    hybrid = hybrid_from_teacher(teacher, config)
    assert torch.equal(hybrid(tokens).logits, teacher(tokens).logits)
    assert (hybrid.lm_head.weight is hybrid.model.embed_tokens.weight) == tied


def test_hybrid_has_the_teachers_weights_and_fresh_gates(teacher):
    hybrid = hybrid_from_teacher(teacher, hybrid_config(teacher.config, [1, 3]))
    ours, theirs = hybrid.state_dict(), teacher.state_dict()
    fresh = {f"model.layers.{i}.self_attn.{n}.weight" for i in (0, 2) for n in ("z_proj", "o_norm")}
    fresh |= {f"model.layers.{i}.self_attn.o_gate.weight" for i in (1, 3)}
    assert ours.keys() - theirs.keys() == fresh
    for name in theirs:
        cloned = (name.endswith(("k_proj.weight", "v_proj.weight")) and ".layers.0." in name) or ".layers.2." in name
        if not cloned:
            assert torch.equal(ours[name], theirs[name]), name
    pointers = {p.data_ptr() for p in teacher.parameters()}
    assert all(p.data_ptr() not in pointers for p in hybrid.parameters())
    assert not hybrid.training
    assert hybrid_from_teacher(teacher.train(), hybrid.config).training


def test_trained_mixers_take_their_layers(teacher):
    config = hybrid_config(teacher.config, [])
    mixers = {i: mixer_from_attention(teacher.model.layers[i].self_attn, config, i) for i in range(4)}
    for mixer in mixers.values():
        torch.nn.init.normal_(mixer.q_proj.weight)
    states = {i: mixer.state_dict() for i, mixer in mixers.items() if i != 2}
    hybrid = hybrid_from_teacher(teacher, hybrid_config(teacher.config, [1]), states)
    weights = [layer.self_attn.q_proj.weight for layer in hybrid.model.layers]
    for i in (0, 3):
        assert torch.equal(weights[i], mixers[i].q_proj.weight)
    for i in (1, 2):  # kept its attention; had no trained mixer
        assert torch.equal(weights[i], teacher.model.layers[i].self_attn.q_proj.weight)


def test_hybrid_refuses_weights_that_do_not_fit(teacher):
    config = hybrid_config(teacher.config, [1])
    state = mixer_from_attention(teacher.model.layers[0].self_attn, config, 0).state_dict()
    incomplete = {name: value for name, value in state.items() if not name.startswith("z_proj")}
    with pytest.raises(ValueError, match=r"do not fit: model\.layers\.0\.self_attn\.z_proj\.weight\."):
        hybrid_from_teacher(teacher, config, {0: incomplete})
    with pytest.raises(ValueError, match=r"do not fit: model\.layers\.0\.self_attn\.other\."):
        hybrid_from_teacher(teacher, config, {0: {**state, "other": state["o_norm.weight"]}})
    config.tie_word_embeddings = False
    with pytest.raises(ValueError, match="tie_word_embeddings must be as in the teacher"):
        hybrid_from_teacher(teacher, config)
