"""The weight transfer: the whole hybrid beside its teacher."""

import pytest
import torch

from hypenet.transfer import hybrid_config, hybrid_from_teacher, mixer_from_attention
from tests.hypenet.test_transfer import FAMILIES, SWITCHES, make_teacher


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_attention_with_rope_and_without_gate_is_the_teacher(tokens, family, tied):
    teacher = make_teacher(family, tie_word_embeddings=tied)
    hybrid = hybrid_from_teacher(
        teacher, hybrid_config(teacher.config, range(4), attn_use_rope=True, attn_use_output_gate=False)
    )
    assert torch.equal(hybrid(tokens).logits, teacher(tokens).logits)
    assert (hybrid.lm_head.weight is hybrid.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("family", "window"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_kept_attention_sees_beyond_a_teachers_window(tokens, family, window):
    teacher, whole = make_teacher(family, **window), make_teacher(family, sliding_window=None)
    hybrid = hybrid_from_teacher(
        teacher, hybrid_config(teacher.config, range(4), attn_use_rope=True, attn_use_output_gate=False)
    )
    assert not torch.allclose(teacher(tokens).logits, whole(tokens).logits, atol=1e-2)
    assert torch.equal(hybrid(tokens).logits, whole(tokens).logits)


def test_a_window_of_the_teacher_does_not_bind_an_rnn_layer_in_it(tokens):
    """One-layer replacement: the mask that the teacher hands its attention has zeros where tokens are."""
    inputs = []
    teacher = make_teacher("mistral", sliding_window=8)
    mixer = mixer_from_attention(teacher.model.layers[0].self_attn, hybrid_config(teacher.config, []), 0)
    teacher.model.layers[0].self_attn = mixer
    mixer.register_forward_hook(lambda _m, _a, kwargs, output: inputs.append((kwargs, output[0])), with_kwargs=True)
    teacher(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    kwargs, output = inputs[0]
    alone, _ = mixer(kwargs["hidden_states"], kwargs["position_embeddings"])
    assert torch.equal(output, alone)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_switch_changes_the_hybrid(tokens, family, switch):
    teacher = make_teacher(family)
    plain = hybrid_from_teacher(teacher, hybrid_config(teacher.config, [1, 3]))
    switched = hybrid_from_teacher(teacher, hybrid_config(teacher.config, [1, 3], **{switch: SWITCHES[switch]}))
    shapes = {name: weight.shape for name, weight in switched.state_dict().items()}
    switched.load_state_dict({n: w for n, w in plain.state_dict().items() if shapes.get(n) == w.shape}, strict=False)
    same = torch.allclose(plain(tokens).logits, switched(tokens).logits, atol=1e-4)
    fewer = sum(p.numel() for p in switched.parameters()) < sum(p.numel() for p in plain.parameters())
    assert same == (switch == "expand_kv_proj")  # cloned heads compute what grouped heads do, until they are trained
    assert fewer == ("rope" not in switch)


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


def test_hybrid_generates_as_the_teacher_says(teacher):
    teacher.generation_config.update(do_sample=True, temperature=0.3, top_k=7, eos_token_id=[5, 9])
    hybrid = hybrid_from_teacher(teacher, hybrid_config(teacher.config, [1]))
    assert hybrid.generation_config.to_dict() == teacher.generation_config.to_dict()
    assert hybrid.generation_config.eos_token_id == [5, 9]
    hybrid.generation_config.temperature = 0.9
    hybrid.generation_config.eos_token_id.append(3)
    assert teacher.generation_config.temperature == 0.3 and teacher.generation_config.eos_token_id == [5, 9]


def test_generation_settings_without_effect_are_left_out(teacher, tmp_path, caplog):
    """transformers reads them, and does not save them."""
    teacher.generation_config.temperature = 0.3
    with pytest.raises(ValueError, match="temperature"):
        teacher.save_pretrained(tmp_path / "teacher")
    hybrid = hybrid_from_teacher(teacher, hybrid_config(teacher.config, [1]))
    hybrid.save_pretrained(tmp_path / "hybrid")
    assert "generation settings temperature have no effect" in caplog.text
    teacher.generation_config.max_new_tokens = 0
    with pytest.raises(ValueError, match="max_new_tokens"):
        hybrid_from_teacher(teacher, hybrid_config(teacher.config, [1]))


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
