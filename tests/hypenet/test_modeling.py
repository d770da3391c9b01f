"""HypeNet as an ordinary transformers model: names, caches, generation, padding, checkpointing, saving."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hypenet import HypeNetForCausalLM
from hypenet.mixer_lightning import LightningAttention

ALL_RNN = ["lightning-attn"] * 4


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def generate(model, tokens, **kwargs):
    return model.generate(tokens, max_new_tokens=20, do_sample=False, **kwargs)[:, tokens.shape[1] :]


def left_padded(tokens, lengths):
    """The last `lengths[i]` tokens of each row, filled up with token 0 on the left, and the mask."""
    mask = torch.arange(tokens.shape[1], 0, -1) <= torch.tensor(lengths)[:, None]
    return tokens * mask, mask.long()


def test_parameter_names_are_the_published_ones(hybrid):
    common = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
    mixers = [common | {"z_proj", "o_norm"}, common | {"o_gate"}] * 2
    block = {"input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i, mixer in enumerate(mixers):
        names = block | {f"self_attn.{name}" for name in mixer}
        expected |= {f"model.layers.{i}.{name}.weight" for name in names}
    assert set(hybrid.state_dict()) == expected
    weights = hybrid.state_dict()
    assert weights["model.layers.0.self_attn.o_norm.weight"].shape == (32,)  # one norm over all heads
    assert weights["model.layers.0.self_attn.q_norm.weight"].shape == (8,)
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (32, 32)  # GQA to MHA
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (16, 32)


@pytest.mark.parametrize("mixers", [None, ALL_RNN, ["attn"] * 4])
def test_generation_with_cache_equals_without(make_hybrid, hybrid, tokens, mixers):
    model = hybrid if mixers is None else make_hybrid(mixer_types=mixers)
    generated = generate(model, tokens, use_cache=True)
    assert torch.equal(generated, generate(model, tokens, use_cache=False))
    assert torch.equal(generated, generate(model, tokens, prefill_chunk_size=7))
    assert len(generated.unique()) > 3  # a model that says one thing would prove nothing


def test_token_by_token_logits_equal_the_forward_pass(hybrid, tokens):
    whole, cache, steps = hybrid(tokens, use_cache=False).logits, None, []
    for t in range(tokens.shape[1]):
        output = hybrid(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    close(torch.cat(steps, dim=1), whole)


def test_chunked_prefill_equals_one(hybrid, tokens):
    whole, cache, chunks = hybrid(tokens, use_cache=True), None, []
    for chunk in tokens.split(16, dim=1):
        output = hybrid(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chunks.append(output.logits)
    close(torch.cat(chunks, dim=1), whole.logits)
    close(cache.state(2), whole.past_key_values.state(2))


def test_left_padded_batch_equals_each_alone(hybrid, tokens):
    padded, mask = left_padded(tokens, [50, 23])
    logits = hybrid(padded, attention_mask=mask).logits
    generated = generate(hybrid, padded, attention_mask=mask)
    in_chunks = generate(hybrid, padded, attention_mask=mask, prefill_chunk_size=9)
    for row, length in enumerate([50, 23]):
        alone = tokens[row : row + 1, -length:]
        close(logits[row : row + 1, -length:], hybrid(alone).logits)
        assert torch.equal(generated[row : row + 1], generate(hybrid, alone))
    assert torch.equal(in_chunks, generated)


def test_beam_search_reorders_states(hybrid, tokens):
    with_cache = generate(hybrid, tokens, num_beams=3, use_cache=True)
    assert torch.equal(with_cache, generate(hybrid, tokens, num_beams=3, use_cache=False))


def test_attention_implementations_agree(hybrid, tokens):
    padded, mask = left_padded(tokens, [50, 23])
    sdpa = hybrid(padded, attention_mask=mask).logits
    hybrid.set_attn_implementation("eager")
    eager = hybrid(padded, attention_mask=mask, output_attentions=True)
    close(eager.logits[mask.bool()], sdpa[mask.bool()])
    assert len(eager.attentions) == 2  # of the attention layers


def test_logits_to_keep_and_hidden_states(hybrid, tokens):
    whole = hybrid(tokens, output_hidden_states=True)
    close(hybrid(tokens, logits_to_keep=3).logits, whole.logits[:, -3:])
    close(hybrid(tokens, logits_to_keep=torch.tensor([4, 9])).logits, whole.logits[:, [4, 9]])
    assert len(whole.hidden_states) == 5
    close(hybrid.lm_head(whole.hidden_states[-1]), whole.logits)


def test_logits_scaling_changes_evaluation_and_not_training(make_hybrid, tokens):
    plain, scaled = make_hybrid(), make_hybrid(attn_logits_scaling="hype 16")
    assert not torch.allclose(plain(tokens).logits, scaled(tokens).logits, atol=1e-2)
    assert torch.equal(plain.train()(tokens).logits, scaled.train()(tokens).logits)


def test_gradient_checkpointing_gives_the_same_gradients(hybrid, tokens):
    hybrid.train()
    gradients = []
    for enable in (False, True):
        if enable:
            hybrid.gradient_checkpointing_enable()
        hybrid.zero_grad()
        hybrid(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in hybrid.named_parameters()})
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_training_makes_no_cache_unasked(hybrid, tokens):
    assert hybrid(tokens).past_key_values is not None
    assert hybrid.train()(tokens).past_key_values is None


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_again_it_is_the_same(make_hybrid, tokens, tmp_path, tied):
    model = make_hybrid(tie_word_embeddings=tied, attn_logits_scaling="hype 16")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, HypeNetForCausalLM)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_cast_leaves_rope_in_float32(hybrid):
    before = hybrid.model.rotary_emb.inv_freq.clone()
    hybrid.bfloat16()
    assert hybrid.lm_head.weight.dtype == torch.bfloat16
    assert hybrid.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(hybrid.model.rotary_emb.inv_freq, before)


def test_bfloat16_runs_and_generates(hybrid, tokens):
    reference = hybrid(tokens).logits
    hybrid.bfloat16()
    close_enough = (hybrid(tokens).logits.float() - reference).abs().mean() / reference.abs().mean()
    assert close_enough < 0.1
    assert generate(hybrid, tokens).shape == (2, 20)


def test_published_sizes_build_on_the_meta_device(make_hybrid):
    with torch.device("meta"):
        model = make_hybrid(hidden_size=2048, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    assert isinstance(model.model.layers[0].self_attn, LightningAttention)
    assert model.model.layers[0].self_attn.o_norm.weight.shape == (2048,)


def test_arguments_that_do_not_fit_are_refused(hybrid, tokens):
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        hybrid()
    with pytest.raises(ValueError, match="must be a HypeNetCache, not a DynamicCache"):
        hybrid(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, 50\]"):
        hybrid(tokens, attention_mask=torch.ones(2, 49))
    with pytest.raises(ValueError, match="leave cache_implementation unset"):
        hybrid.generate(tokens, cache_implementation="static", max_new_tokens=1)
