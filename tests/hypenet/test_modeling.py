"""HypeNet as an ordinary transformers model: names, caches, generation, padding, checkpointing, saving."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, pipeline
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hypenet import HypeNetForCausalLM, HypeNetModel
from hypenet.inputs import layer_masks
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


def test_an_all_ones_mask_is_no_mask(hybrid, tokens):
    assert torch.equal(hybrid(tokens, attention_mask=torch.ones_like(tokens)).logits, hybrid(tokens).logits)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:_compile flag")
@torch.no_grad()  # on the CPU it has no backward
def test_flex_attention_agrees(make_hybrid, tokens, use_cache):
    model = make_hybrid(mixer_types=["swa", "attn"] * 2, mixer_options={"swa": {"window": 5}})
    padded, mask = left_padded(tokens, [50, 23])
    expected = model(padded, attention_mask=mask).logits
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # compiling takes long
        cache, parts = None, []
        for end in (30, 49, 50) if use_cache else (50,):
            start = 0 if cache is None else cache.get_seq_length()
            output = model(
                padded[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=use_cache
            )
            cache = output.past_key_values
            parts.append(output.logits)
    close(torch.cat(parts, dim=1)[mask.bool()], expected[mask.bool()])


def test_flash_attention_is_not_refused(make_hybrid, tokens, monkeypatch):
    """transformers asks the class. What runs is its sdpa here, since the kernels need a GPU."""
    assert HypeNetForCausalLM._supports_flash_attn and HypeNetForCausalLM._supports_sdpa
    assert HypeNetForCausalLM._supports_flex_attn
    model = make_hybrid(mixer_types=["swa", "attn"] * 2, mixer_options={"swa": {"window": 60}})
    seen = []

    def flash(module, q, k, v, attention_mask, **kwargs):
        seen.append((attention_mask, kwargs))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, None)

    expected = model(tokens).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model.config._attn_implementation = "flash_attention_2"
    close(model(tokens).logits, expected)
    assert [kwargs.get("sliding_window") for _, kwargs in seen] == [60, None] * 2

    padded, mask = left_padded(tokens, [50, 23])
    model(padded, attention_mask=mask)
    assert all(torch.equal(given.long(), mask) for given, _ in seen[4:])  # [B, T], as flash attention has it
    model(tokens, cu_seq_lens_q=torch.tensor([0, 50, 70, 100], dtype=torch.int32))
    for given, kwargs in seen[8:]:
        assert given is None and kwargs["cu_seq_lens_q"] is kwargs["cu_seq_lens_k"]
        assert kwargs["cu_seq_lens_q"].tolist() == [0, 50, 70, 100] and kwargs["max_length_q"] == 50


def test_text_generation_pipeline(hybrid, tokens):
    words = {f"w{i}": i for i in range(61)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", padding_side="left")
    prompts = [" ".join(f"w{i}" for i in row.tolist()) for row in (tokens[0, :30], tokens[1, :9])]
    generate = pipeline("text-generation", model=hybrid, tokenizer=tokenizer, device="cpu")
    kwargs = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    alone = [generate(prompt, **kwargs)[0]["generated_text"] for prompt in prompts]
    together = [output[0]["generated_text"] for output in generate(prompts, batch_size=2, **kwargs)]
    assert together == alone and all(len(text.split()) == 8 for text in alone)


def test_generation_from_embeddings(hybrid, tokens):
    embedded = hybrid.get_input_embeddings()(tokens)
    generated = hybrid.generate(inputs_embeds=embedded, max_new_tokens=20, do_sample=False)
    assert torch.equal(generated, generate(hybrid, tokens))


def test_generation_goes_on_from_a_cache(hybrid, tokens):
    """A conversation: the cache of one call to `generate` serves the next."""
    first = hybrid.generate(tokens, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tokens[:, :7]], dim=1)
    again = hybrid.generate(longer, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, hybrid.generate(longer, max_new_tokens=5, do_sample=False))


def test_assisted_generation_is_refused(hybrid, teacher, tokens):
    """It rolls the cache back to the tokens that were right, and a state cannot be rolled back."""
    for assistance in ({"assistant_model": teacher}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="assisted generation is not supported"):
            generate(hybrid, tokens[:1], **assistance)


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
    for bounds in ([0, 70, 100], [1, 50, 100], [0, 50], [0, 50, 50, 100], [0, 60, 50, 100]):
        with pytest.raises(ValueError, match="cu_seq_lens_q must rise from 0 to 100, and no document may cross"):
            hybrid(tokens, cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32))
    padded = torch.ones(2, 50).index_fill(1, torch.tensor(0), 0)
    for other in ({"attention_mask": padded}, {"use_cache": True}):
        with pytest.raises(ValueError, match="Packed documents take neither attention_mask nor a cache"):
            hybrid(tokens, cu_seq_lens_q=torch.tensor([0, 50, 100], dtype=torch.int32), **other)
    with pytest.raises(ValueError, match="leave cache_implementation unset"):
        hybrid.generate(tokens, cache_implementation="static", max_new_tokens=1)


def test_documents_are_seen_behind_a_mask_of_ones(hybrid, tokens):
    """Most collators send one."""
    positions = torch.cat([torch.arange(20), torch.arange(30)]).expand(2, 50)
    packed = hybrid(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
    close(packed, hybrid(tokens, position_ids=positions).logits)
    close(packed[:, 20:], hybrid(tokens[:, 20:]).logits)


def test_the_model_without_its_head_loads_from_the_same_folder(hybrid, tokens, tmp_path):
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is HypeNetModel
    assert torch.equal(loaded(tokens).last_hidden_state, hybrid.model(tokens).last_hidden_state)


def test_the_sliding_mask_is_left_to_the_layer_where_it_can(make_hybrid, tokens):
    """Without padding and packing sdpa needs no [T, T] for the window: the layer knows better."""
    model = make_hybrid(mixer_types=["swa"] * 4, mixer_options={"swa": {"window": 5}})
    embedded, padding = model.get_input_embeddings()(tokens), torch.arange(50).expand(2, 50) > 2

    def mask(attention_mask, implementation):
        model.config._attn_implementation = implementation
        return layer_masks(model.config, embedded, attention_mask, None, None)["sliding_attention"]

    assert mask(None, "sdpa") is None
    assert mask(padding, "sdpa").shape == (2, 1, 50, 50)
    assert mask(None, "eager").shape[2:] == (50, 50)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_documents_stay_apart_whatever_positions_they_are_given(make_hybrid, tokens, implementation):
    """As a part of a longer row has them."""
    hybrid = make_hybrid(attn_implementation=implementation)
    positions = torch.arange(7, 107)[None]
    bounds = torch.tensor([0, 50, 100], dtype=torch.int32)
    packed = hybrid(tokens.view(1, -1), position_ids=positions, cu_seq_lens_q=bounds).logits
    close(packed[:, 50:], hybrid(tokens[1:], position_ids=positions[:, 50:]).logits)
