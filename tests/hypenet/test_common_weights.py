"""What transformers' common tests ask of a model's weights, in our own words, of every mixer.

First values, resized and tied embeddings, saving and loading, and weights on other devices.
"""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hypenet.configuration_hypenet import HypeNetConfig
from hypenet.mixers import Mixer
from hypenet.modeling_hypenet import HypeNetForCausalLM, HypeNetModel
from hypenet.norm import RMSNorm
from tests.hypenet.sizes import SIZES, two_rows

WORDS = SIZES["vocab_size"]


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def ids():
    return two_rows(17)


def same_weights(model, other, *, but=()):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        if name not in but:
            assert torch.equal(weight, theirs[name]), name


# First values.


def assert_new(model, *, close=0.0):
    """Its weights are those of a new model, save for what is drawn: of that, spread and bounds.

    Args:
        close: the relative error of a weight's dtype.
    """
    std = model.config.initializer_range
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, RMSNorm):
            assert (own["weight"] == 1).all()
        elif isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            assert 0.7 * std < own["weight"].std() < 1.3 * std
            assert module.__dict__.get("bias") is None or not module.bias.any()
        elif isinstance(module, Mixer):
            drawn = [{name: x.double() for name, x in module.first_values().items()} for _ in range(20)]
            assert own.keys() == drawn[0].keys()
            for name, weight in own.items():
                values = torch.stack([x[name] for x in drawn])
                room = 3 * values.std(0).max() + close * values.abs().max() + 1e-6
                low, high = values.min() - room, values.max() + room
                assert weight.isfinite().all() and (weight >= low).all() and (weight <= high).all(), name
                if torch.equal(values[0], values[1]):  # nothing is drawn
                    torch.testing.assert_close(weight.double(), values[0], rtol=close, atol=max(close, 1e-6))
        else:
            assert not own, f"{type(module).__name__} has parameters that nothing here knows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_model_has_first_values(make_model, dtype):
    config = make_model().config
    assert_new(HypeNetForCausalLM(config))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert model.dtype == dtype
    assert_new(model, close=0.0 if dtype == torch.float32 else 2.0**-7)


def test_a_model_without_values_gets_first_values(make_model):
    """As those do that are made on the meta device, whatever stands in the memory that they are given."""
    with torch.device("meta"):
        model = HypeNetForCausalLM(make_model().config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    assert_new(model)


def test_what_a_checkpoint_does_not_fit_gets_first_values_and_the_rest_is_loaded(make_model, tmp_path):
    """Other heads in RNN layers, and other norms: only where that is asked for."""
    trained = make_model()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(100)
    trained.save_pretrained(tmp_path)
    keys = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "intermediate_size": 40}
    with pytest.raises(ValueError, match="of another shape"):
        HypeNetForCausalLM.from_pretrained(tmp_path, **keys, lightning_head_dim=4, lightning_nh=8, lightning_nkv=8)
    keys |= {"lightning_head_dim": 4, "lightning_nh": 8, "lightning_nkv": 8, "ignore_mismatched_sizes": True}
    model, info = HypeNetForCausalLM.from_pretrained(tmp_path, **keys, output_loading_info=True)
    other = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    assert other
    same_weights(model, trained, but=other)
    assert_new(_with_new(model, trained, other))


def _with_new(model, trained, other):
    """`model`, with weights that were loaded put back at first values: what is left are those that were not."""
    model = copy.deepcopy(model)
    new = HypeNetForCausalLM(model.config).state_dict()
    state = {name: weight if name in other else new[name] for name, weight in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def test_weights_are_drawn_as_wide_as_the_configuration_says(make_model):
    for std in (1e-9, 0.02):
        model = HypeNetForCausalLM(make_model(initializer_range=std).config)
        assert_new(model)


# Embeddings.


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_resized(make_model, ids, tied):
    model = make_model(tie_word_embeddings=tied)
    with torch.no_grad():  # a graph would hold on to the old shapes
        expected = model(ids).logits
    for words in (WORDS + 10, WORDS, WORDS - 1):
        model.resize_token_embeddings(words)
        assert model.config.vocab_size == model.vocab_size == words
        assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (words, 32)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        with torch.no_grad():
            logits = model(ids.clamp(max=words - 1)).logits
        assert logits.shape[-1] == words and logits.isfinite().all()
        if words >= WORDS:
            torch.testing.assert_close(logits[..., :WORDS], expected)
    model.resize_token_embeddings(WORDS, pad_to_multiple_of=32)
    assert model.config.vocab_size == 64
    model.train()(ids.clamp(max=WORDS - 2), labels=ids.clamp(max=WORDS - 2)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_resized_model_is_saved_and_loaded(make_model, ids, tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.resize_token_embeddings(WORDS + 3)
    model.save_pretrained(tmp_path)
    loaded = HypeNetForCausalLM.from_pretrained(tmp_path)
    same_weights(loaded, model)
    assert torch.equal(loaded(ids + 2).logits, model(ids + 2).logits)


def test_embeddings_and_head_can_be_others(model, ids):
    embedding, head = torch.nn.Embedding(90, 32), torch.nn.Linear(32, 90, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is embedding and model.get_output_embeddings() is head
    assert model.get_decoder() is model.model
    assert model(ids + 20).logits.shape == (2, 17, 90)


def test_a_tied_head_stays_tied(make_model, ids, tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = HypeNetForCausalLM.from_pretrained(tmp_path)
    for tied in (model, loaded, copy.deepcopy(loaded), loaded.double(), loaded.bfloat16()):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
    loaded = HypeNetForCausalLM.from_pretrained(tmp_path).train()
    torch.optim.SGD(loaded.parameters(), lr=0.1).zero_grad()
    loaded(ids, labels=ids).loss.backward()
    with torch.no_grad():
        loaded.lm_head.weight -= loaded.lm_head.weight.grad
    assert torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)
    assert len(list(loaded.parameters())) == len(loaded.state_dict()) - 1


# Saving and loading.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_all_weights_are_saved_and_loaded(make_model, ids, tmp_path, tied, shard):
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    loaded, info = HypeNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    same_weights(loaded, model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_decoder_gives_its_weights_to_a_model_with_a_head(make_model, ids, tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    loaded = HypeNetForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    untied = make_model()
    untied.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        HypeNetForCausalLM.from_pretrained(tmp_path)
    same_weights(HypeNetModel.from_pretrained(tmp_path), untied.model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_is_that_of_every_weight(model, ids, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = HypeNetForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {x.dtype for x in loaded.parameters()} == {dtype} and loaded.config.dtype == dtype
    same_weights(loaded, copy.deepcopy(model).to(dtype))
    loaded.save_pretrained(tmp_path / "again")
    assert HypeNetForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").dtype == dtype


def test_a_state_dict_may_take_the_place_of_files(model, ids):
    other = HypeNetForCausalLM(model.config).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(ids).logits, model(ids).logits)
    given = HypeNetForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(given(ids).logits, model(ids).logits)


def test_the_configuration_is_read_as_it_was_written(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    read = HypeNetConfig.from_pretrained(tmp_path)
    ours, theirs = model.config.to_dict(), read.to_dict()
    for name in ("architectures", "dtype", "torch_dtype", "_attn_implementation_internal"):
        ours.pop(name, None), theirs.pop(name, None)
    assert ours == theirs


# Other devices, by accelerate.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("away", ["cpu", "disk"])
def test_weights_may_lie_on_another_device(make_model, ids, tmp_path, tied, away):
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": away, "model.layers.1": "cpu"}
    loaded = HypeNetForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert next(loaded.model.layers[0].parameters()).is_meta == (away == "disk")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    kwargs = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **kwargs), model.generate(ids, **kwargs))
