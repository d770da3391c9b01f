"""The hybrid cache: what transformers' generation does to a cache, done to states as well."""

import gc

import pytest
import torch

from hypenet.cache import HypeNetCache
from hypenet.mixers import MIXERS


@pytest.fixture
def cache(hybrid, tokens):
    return hybrid(tokens, use_cache=True).past_key_values


def next_logits(hybrid, cache, rows):
    return hybrid(torch.full((rows, 1), 7), past_key_values=cache).logits[:, -1]


def expected_logits(hybrid, tokens):
    return hybrid(torch.cat([tokens, torch.full((len(tokens), 1), 7)], dim=1), use_cache=False).logits[:, -1]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_states_are_float32_and_of_fixed_size(hybrid, tokens, cache):
    assert isinstance(cache, HypeNetCache)
    assert {cache.get_seq_length(i) for i in range(4)} == {50}
    assert cache.state(0).shape == (2, 4, 8, 8) and cache.state(0).dtype == torch.float32
    close(next_logits(hybrid, cache, rows=2), expected_logits(hybrid, tokens))
    assert cache.state(0).shape == (2, 4, 8, 8)


def test_reorder_and_repeat_and_select(hybrid, tokens, cache):
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    close(next_logits(hybrid, cache, rows=3), expected_logits(hybrid, tokens[[1, 1, 0]]))


def test_reset_forgets(hybrid, tokens, cache):
    cache.reset()
    assert cache.get_seq_length() == 0
    close(next_logits(hybrid, cache, rows=2), expected_logits(hybrid, tokens[:, :0]))


def test_a_state_cannot_be_cropped(cache):
    with pytest.raises(ValueError, match="cannot be rolled back"):
        cache.crop(-1)


def test_a_state_layer_has_no_keys(cache):
    with pytest.raises(TypeError, match="update_state"):
        cache.update(torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8), 0)


def test_a_state_has_memory_of_its_own(hybrid):
    cache, states = HypeNetCache(hybrid.config), torch.randn(3, 2, 5)
    cache.update_state((states[0], states), 0, 1)
    view, whole = cache.state(0)
    assert torch.equal(view, states[0]) and view.untyped_storage().nbytes() == view.nbytes
    assert whole is states


def _bytes_of_all_tensors():
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@torch.no_grad()
def test_a_prefill_in_many_calls_leaves_no_more_than_one_in_few(make_hybrid, tokens):
    """Over the whole process: neither the cache nor the model keeps anything of a call."""
    model = make_hybrid(mixer_types=sorted(MIXERS), num_hidden_layers=len(MIXERS), mixer_options={"swa": {"window": 5}})
    held = []
    for size in (25, 25, 5):  # the first fills what is kept for good, e.g. a mixer's constants
        cache = None
        for part in tokens.split(size, dim=1):
            cache = model(part, past_key_values=cache, use_cache=True).past_key_values
        held.append(_bytes_of_all_tensors())
        del cache
    assert held[1] == held[2]
