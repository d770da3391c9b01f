"""What transformers' common tests ask of a causal model's forward and generate, in our own words, of every mixer.

The cache, export and compilation are in test_peers.py; checkpointing, packing and beams in test_every_mixer.py.
"""

import pickle

import pytest
import torch

from tests.hypenet.sizes import left_padded, two_rows

LENGTH, PADDING = 19, 7


@pytest.fixture
def model(make_model):
    return make_model().double()


@pytest.fixture
def ids():
    return two_rows(LENGTH)


@pytest.fixture(params=["none", "left", "right", "both", "ones"])
def mask(request):
    if request.param == "none":
        return None
    mask = left_padded(LENGTH, PADDING if request.param in ("left", "both") else 0)
    if request.param in ("right", "both"):
        mask[0, -PADDING:] = 0
    return mask


def exact(actual, expected):
    """For float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def close(actual, expected):
    """For float32. transformers' eager attention rounds its weights to it, where the lowest float64 is infinite."""
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)


def at_tokens(x, mask):
    return x if mask is None else x[mask.bool()]


def test_eager_and_sdpa_are_one(make_model, ids, mask):
    """With every mask, in evaluation and in training, outputs and gradients."""
    model = make_model()
    for training in (False, True):
        outputs = []
        for implementation in ("eager", "sdpa"):
            model.train(training).set_attn_implementation(implementation)
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = at_tokens(model(inputs_embeds=embedded, attention_mask=mask).logits, mask)
            outputs.append((logits, *torch.autograd.grad(logits.square().sum(), embedded)))
        close(*outputs)
        assert outputs[0][0].std() > 0.1


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(model, ids):
    """Logits, hidden states and states of a batch of three are those of each row alone."""
    rows = torch.cat([ids, ids[:1].flip(1)])
    whole = model(rows, output_hidden_states=True, use_cache=False)
    for i in range(3):
        alone = model(rows[i : i + 1], output_hidden_states=True, use_cache=False)
        exact(whole.logits[i : i + 1], alone.logits)
        exact([x[i : i + 1] for x in whole.hidden_states], list(alone.hidden_states))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_what_stands_at_padding_does_not_matter(model, ids, side):
    mask = torch.ones_like(ids)
    mask[1, slice(None, PADDING) if side == "left" else slice(-PADDING, None)] = 0
    exact(*(at_tokens(model(x, attention_mask=mask).logits, mask) for x in (ids * mask, ids)))


@torch.no_grad()
def test_a_token_does_not_see_the_next(model, ids):
    other = ids.clone()
    other[:, 12:] = other[:, 12:].flip(1)
    exact(model(other).logits[:, :12], model(ids).logits[:, :12])
    assert not torch.allclose(model(other).logits[:, 12:], model(ids).logits[:, 12:])


@torch.no_grad()
def test_twice_the_same_is_twice_the_same(model, ids):
    for training in (False, True):
        model.train(training)
        assert torch.equal(model(ids).logits, model(ids).logits)


@torch.no_grad()
def test_embeddings_are_as_good_as_ids(model, ids):
    mask = left_padded(LENGTH, PADDING)
    embedded = model.get_input_embeddings()(ids)
    exact(model(inputs_embeds=embedded, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    for both in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**both)


@torch.no_grad()
def test_a_tuple_holds_what_the_record_does(model, ids):
    for part in (model, model.model):
        kwargs = {"use_cache": False, "output_hidden_states": True}
        record, values = part(ids, **kwargs), part(ids, return_dict=False, **kwargs)
        assert isinstance(values, tuple)
        exact(values, record.to_tuple())
        assert pickle.loads(pickle.dumps(record)).keys() == record.keys()


@pytest.mark.parametrize("mask", ["none", "both"], indirect=True)
def test_hidden_states_and_attentions_are_returned_and_have_gradients(make_model, ids, mask):
    """The attentions are those of softmax attention, in the order of the layers: an RNN has none."""
    model = make_model()
    model.set_attn_implementation("eager")
    output = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    softmax = [layer for layer in model.config.layer_types if layer != "linear_attention"]
    assert len(output.attentions) == len(softmax) and len(output.hidden_states) == 3
    for weights in output.attentions:
        assert weights.shape == (2, model.config.num_attention_heads, LENGTH, LENGTH)
        shares = at_tokens(weights.sum(-1).transpose(1, 2), mask)
        close(shares, torch.ones_like(shares))
    kept = [*output.hidden_states, *output.attentions]
    for x in kept:
        x.retain_grad()
    at_tokens(output.logits, mask)[..., 0].sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in kept)


@torch.no_grad()
def test_logits_to_keep_are_the_last_or_those_asked_for(model, ids):
    whole = model(ids).logits
    exact(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    exact(model(ids, logits_to_keep=torch.tensor([0, 5, 18])).logits, whole[:, [0, 5, 18]])


def test_one_token_and_none_at_all_in_a_row(model, ids):
    """A row that is all padding gives no numbers that anyone reads, but neither NaNs nor other rows' losses."""
    mask = torch.ones_like(ids)
    mask[1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    loss = model.train()(ids, attention_mask=mask, labels=labels).loss
    exact(loss, model(ids[:1], labels=ids[:1]).loss)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert all(g.isfinite().all() for g in grads)
    model.eval()
    exact(model(ids[:, :1]).logits, model(ids).logits[:, :1])


def test_what_generate_returns_is_what_forward_gives(model, ids):
    model.set_attn_implementation("eager")
    kwargs = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    extras = {"output_logits": True, "output_scores": True, "output_hidden_states": True, "output_attentions": True}
    by_cache = model.generate(ids, **kwargs, **extras)
    without = model.generate(ids, use_cache=False, **kwargs, **extras)
    assert torch.equal(by_cache.sequences, without.sequences) and by_cache.sequences.shape == (2, LENGTH + 4)
    expected = model(by_cache.sequences[:, :-1], logits_to_keep=4).logits
    close(torch.stack(by_cache.logits, 1).to(expected), expected)
    close(torch.stack(without.logits, 1).to(expected), expected)
    assert len(by_cache.hidden_states) == len(by_cache.attentions) == 4
    assert [len(step) for step in by_cache.hidden_states] == [3] * 4
    assert by_cache.past_key_values.get_seq_length() == LENGTH + 3


def test_generate_from_embeddings_and_from_what_was_generated(model, ids):
    kwargs = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **kwargs)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, **kwargs), expected[:, LENGTH:])
    first = model.generate(ids, **kwargs | {"max_new_tokens": 2}, return_dict_in_generate=True)
    # Without a mask, transformers takes a word that has the padding's id for padding.
    rest = kwargs | {"max_new_tokens": 3, "attention_mask": torch.ones_like(first.sequences)}
    assert torch.equal(model.generate(first.sequences, past_key_values=first.past_key_values, **rest), expected)
