"""What transformers asks of a causal model in its own common tests, and what its users do with one.

Every mixer; half of the layers are attention, since a hybrid has both.
"""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from hypenet.cache import CACHE, HypeNetCache
from hypenet.configuration_hypenet import HypeNetConfig
from hypenet.modeling_hypenet import HypeNetForCausalLM, HypeNetModel
from tests.hypenet.sizes import SIZES, left_padded, two_rows

ROOT = Path(__file__).parents[2]
LENGTH = 21


@pytest.fixture
def ids():
    return two_rows(LENGTH)


@pytest.fixture
def mask():
    """8 tokens of padding on the left of the second row."""
    return left_padded(LENGTH, 8)


@pytest.fixture
def model(make_model):
    return make_model().double()


def exact(actual, expected):
    """For float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_the_cache_has_the_name_of_every_version(hybrid, tokens):
    """transformers 5.24 calls it `cache`, all before it `past_key_values`; callers know one of the two."""
    logits = []
    for name in ("past_key_values", "cache"):
        for model in (hybrid, hybrid.model):
            cache = HypeNetCache(hybrid.config)
            model(tokens[:, :20], use_cache=True, **{name: cache})
            output = model(tokens[:, 20:], use_cache=True, **{name: cache})
            assert output[CACHE] is cache and cache.get_seq_length() == 50
            logits.append(output.logits if model is hybrid else hybrid.lm_head(output.last_hidden_state))
        with pytest.raises(ValueError, match="HypeNetCache, not a DynamicCache"):
            hybrid(tokens, **{name: DynamicCache()})
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0])
    with pytest.raises(ValueError, match="not both"):
        hybrid(tokens, past_key_values=cache, cache=cache)


def test_nothing_that_transformers_has_renamed_is_used(hybrid, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        hybrid.generate(tokens, max_new_tokens=2, do_sample=False)
        hybrid.train()(tokens, labels=tokens).loss.backward()


@torch.no_grad()
def test_continued_from_a_cache_it_is_as_in_one_call(model, ids, mask):
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    first = model(ids[:, :13], attention_mask=mask[:, :13], use_cache=True)
    second = model(ids[:, 13:], attention_mask=mask, use_cache=True, **{CACHE: first[CACHE]})
    exact(torch.cat([first.logits, second.logits], dim=1)[mask.bool()], whole[mask.bool()])


SCRIPT = """
import sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
sys.path.insert(0, sys.argv[1])
from hypenet.configuration_hypenet import HypeNetConfig
from hypenet.configuration_hypenet import HypeNetConfig
from hypenet.mixers import MIXERS
from hypenet.modeling_hypenet import HypeNetForCausalLM, HypeNetModel
from hypenet.modeling_hypenet import HypeNetForCausalLM
from tests.hypenet.sizes import SIZES

def make():
    torch.manual_seed(1)
    types = sorted(MIXERS)
    return HypeNetForCausalLM(HypeNetConfig(**SIZES | {"mixer_types": types, "num_hidden_layers": len(types)})).eval()

ids = torch.arange(1, 22)[None]
with FakeTensorMode(allow_non_fake_inputs=True):
    assert make()(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, SIZES["vocab_size"])
exported = torch.export.export(make(), (ids,), {"use_cache": False}).module()(ids, use_cache=False).logits
logits = make()(ids).logits
assert type(logits) is torch.Tensor, type(logits)
torch.testing.assert_close(exported, logits)
with torch.inference_mode():
    make()(ids)
make().train()(ids, labels=ids).loss.backward()
"""


def test_what_is_traced_first_leaves_nothing_to_later_models():
    """In a process of its own: whatever is kept for later calls, the first of them is one without values."""
    subprocess.run([sys.executable, "-c", SCRIPT, str(ROOT)], check=True, timeout=200)


@torch.no_grad()
def test_states_pass_over_padding_wherever_it_is(model, ids):
    """Rows of other lengths in every turn of a conversation, one turn without a token: as each row alone."""
    mask = torch.ones(2, 26, dtype=torch.long)
    mask[0, 3:6], mask[1, :4], mask[1, 9:12], mask[0, 12:15], mask[1, 15:17] = 0, 0, 0, 0, 0
    ids = torch.cat([ids, ids[:, :5]], dim=1)
    sliding = "swa" in model.config.mixer_types  # its window counts padding
    cache, logits = None, []
    for start, end in ((0, 12), (12, 15), (15, 16), (16, 26)):
        output = model(ids[:, start:end], attention_mask=mask[:, :end], use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        logits.append(output.logits)
    for row in () if sliding else (0, 1):
        alone = model(ids[row][mask[row].bool()][None]).logits[0]
        exact(torch.cat(logits, dim=1)[row][mask[row].bool()], alone)


def test_a_batch_padded_on_the_right_is_generated_from(model, ids):
    """transformers warns of it, since the first new token follows a padding token; it is not refused."""
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    generated = model.generate(ids * mask, **kwargs)
    assert torch.equal(generated, model.generate(ids * mask, use_cache=False, **kwargs))
    assert torch.equal(generated[:1], model.generate(ids[:1], **kwargs | {"attention_mask": mask[:1]}))


def close_at_tokens(actual, expected, mask):
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_exported_with_a_mask_it_serves_any_number_of_rows_and_tokens(model, ids, mask):
    """Tokenizers always give a mask."""
    dims = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", min=2, max=4096)}
    shapes = {"input_ids": dims, "attention_mask": dims, "use_cache": None}
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    longer = torch.ones(3, 70, dtype=torch.long)
    longer[1, :40] = longer[2, 60:] = 0  # on the left, and at the end
    more = torch.randint(1, SIZES["vocab_size"], (3, 70), generator=torch.Generator().manual_seed(7))
    for tokens, at in ((ids, mask), (more, longer)):
        expected = model(tokens, attention_mask=at, use_cache=False).logits
        close_at_tokens(exported(input_ids=tokens, attention_mask=at, use_cache=False).logits, expected, at)
    if "linear_attention" not in model.config.layer_types:
        return
    longer[0, 20:23] = 0
    with pytest.raises(RuntimeError, match="Padding follows tokens"):
        exported(input_ids=more, attention_mask=longer, use_cache=False)


@torch.no_grad()
def test_exported_with_positions_it_refuses_documents(hybrid, ids):
    model = hybrid.double()
    positions = torch.arange(LENGTH).expand(2, LENGTH)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    exported = torch.export.export(model, (), inputs).module()
    exact(exported(**inputs).logits, model(**inputs).logits)
    with pytest.raises(RuntimeError, match="begin anew"):
        exported(**inputs | {"position_ids": positions % 7})


@torch.no_grad()
def test_an_exported_step_continues_a_cache(model, ids, mask):
    cache = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)[CACHE]
    inputs = {"input_ids": ids[:, -1:], "attention_mask": mask, "use_cache": True}
    step = torch.export.export(model, (), {**inputs, CACHE: copy.deepcopy(cache)}).module()
    actual, expected = step(**inputs, **{CACHE: copy.deepcopy(cache)}), model(**inputs, **{CACHE: cache})
    exact(actual.logits, expected.logits)
    exact(tree_leaves(actual[CACHE]), tree_leaves(expected[CACHE]))
    assert actual[CACHE].get_seq_length() == LENGTH


def test_compiled_as_one_graph_it_takes_a_mask_a_cache_and_labels(model, ids, mask):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        first = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        step = compiled(ids[:, -1:], attention_mask=mask, use_cache=True, **{CACHE: first[CACHE]})
        exact(step.logits, expected[:, -1:])
    model.train()
    loss = compiled(ids, attention_mask=mask, labels=ids).loss
    grads = torch.autograd.grad(loss, list(model.parameters()))
    exact(grads, torch.autograd.grad(model(ids, attention_mask=mask, labels=ids).loss, list(model.parameters())))


def test_no_generic_backend_takes_it():
    """vLLM and SGLang ask the class; they would run RNN layers without states between steps."""
    for cls in (HypeNetForCausalLM, HypeNetModel):
        assert not cls.is_backend_compatible()


@torch.no_grad()
def test_an_argument_is_understood_or_refused(hybrid, tokens):
    bounds = torch.tensor([0, 20, 50, 100], dtype=torch.int32)
    exact(hybrid(tokens, cu_seqlens=bounds).logits, hybrid(tokens, cu_seq_lens_q=bounds).logits)
    labelled = hybrid.train()(tokens, cu_seqlens=bounds, labels=tokens).loss
    exact(labelled, hybrid(tokens, cu_seq_lens_q=bounds, labels=tokens).loss)
    for model in (hybrid, hybrid.model):
        with pytest.raises(TypeError, match="no argument attention_msk"):
            model(tokens, attention_msk=torch.ones_like(tokens))
        with pytest.raises(TypeError, match="not both"):
            model(tokens, cu_seqlens=bounds, cu_seq_lens_q=bounds)
        model(tokens, token_type_ids=torch.zeros_like(tokens), output_attentions=False, return_dict=True)


def test_heads_alone_make_a_configuration():
    for heads, kv_heads in ((16, 16), (12, 12), (32, 32), (64, 32)):
        assert HypeNetConfig(num_attention_heads=heads).num_key_value_heads == kv_heads
    with pytest.raises(ValueError, match="no multiple of num_key_value_heads"):
        HypeNetConfig(num_attention_heads=16, num_key_value_heads=32)


@pytest.mark.parametrize("head", ["tied", "tied and stored", "its own"])
def test_sizes_that_differ_are_made_anew_where_that_is_asked_for(make_hybrid, tmp_path, head):
    make_hybrid(tie_word_embeddings=head != "its own").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if head == "tied and stored":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for words in (10, 70):
        with pytest.raises(ValueError, match=r"of another shape: .*embed_tokens\.weight"):
            AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=words)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=words, ignore_mismatched_sizes=True)
        assert model.lm_head.weight.shape == (words, 32) and model.lm_head.weight.isfinite().all()
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (head != "its own")
        assert torch.equal(model.model.norm.weight, weights["model.norm.weight"])
        decoder = AutoModel.from_pretrained(tmp_path, vocab_size=words, ignore_mismatched_sizes=True)
        assert decoder.embed_tokens.weight.shape == (words, 32)
