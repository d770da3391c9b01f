"""What transformers asks of a causal model in its own common tests, and what its users do with one.

Every mixer; half of the layers are attention, since a hybrid has both.
"""

import warnings

import pytest
import torch
from transformers import DynamicCache

from hypenet.cache import CACHE, HypeNetCache
from hypenet.mixers import MIXERS
from tests.hypenet.sizes import SIZES

OPTIONS = {"swa": {"window": 5}, "gsa": {"slots": 6}}
LENGTH = 21


@pytest.fixture
def ids():
    return torch.randint(1, SIZES["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(6))


@pytest.fixture
def mask():
    """8 tokens of padding on the left of the second row."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :8] = 0
    return mask


@pytest.fixture(params=sorted(MIXERS))
def make_model(request, make_hybrid):
    """A function from keys of the configuration to a model with the mixer."""
    options = {name: options for name, options in OPTIONS.items() if name == request.param}

    def make(**keys):
        types = [request.param, "attn"]
        keys = {"mixer_types": types, "num_hidden_layers": 2, "attn_logits_scaling": "hype 16", **keys}
        return make_hybrid(mixer_options=options, **keys)

    return make


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
