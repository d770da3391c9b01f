"""Every mixer in a model that behaves as any other: generation, caches, padding, packing, checkpointing, saving.

Half of the layers are attention, half are the mixer; "all" is one model with every mixer in a layer of its own.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hypenet.cache import StateLayer, WindowLayer
from hypenet.mixers import MIXERS
from tests.hypenet.sizes import EACH, SMALL, left_padded, two_rows

LENGTH, NEW = 27, 6


@pytest.fixture(params=[*EACH, "all"])
def make_model(request, make_hybrid):
    """A function from keys of the configuration to a model."""
    types = sorted(MIXERS) if request.param == "all" else [request.param, "attn"] * 2
    options = {name: options for name, options in SMALL.items() if name in types}

    def make(**keys):
        return make_hybrid(
            mixer_types=types,
            num_hidden_layers=len(types),
            mixer_options=options,
            attn_logits_scaling="hype 16",
            **keys,
        )

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def ids():
    return two_rows(LENGTH)


@pytest.fixture
def mask():
    """13 tokens of padding on the left of the second row."""
    return left_padded(LENGTH, 13)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def exact(actual, expected):
    """For float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def generate(model, ids, **kwargs):
    kwargs = {"max_new_tokens": NEW, "do_sample": False} | kwargs
    return model.generate(ids, **kwargs)[:, ids.shape[1] :]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_padded_batch_generates_what_each_prompt_does_alone(model, ids, mask):
    batch = ids * mask
    generated = generate(model, batch, attention_mask=mask)
    assert torch.equal(generated[:1], generate(model, ids[:1]))
    assert torch.equal(generated[1:], generate(model, ids[1:, 13:]))
    assert torch.equal(generated, generate(model, batch, attention_mask=mask, use_cache=False))
    assert torch.equal(generated, generate(model, batch, attention_mask=mask, prefill_chunk_size=10))
    assert len(generated.unique()) > 2  # a model that says one thing would prove nothing


def test_padding_on_the_right_is_as_if_it_were_not_there(model, ids):
    """As batches are padded for training."""
    model.double().train()
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    padded = model(ids, attention_mask=mask).logits
    alone = [model(ids[:1]).logits[0], model(ids[1:, :14]).logits[0]]
    exact(padded[mask.bool()], torch.cat(alone))
    exact(gradients(model, padded[mask.bool()].square().sum()), gradients(model, torch.cat(alone).square().sum()))


def test_beams_follow_their_states(model, ids, mask):
    kwargs = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    with_cache = generate(model, ids * mask, **kwargs)
    assert torch.equal(with_cache, generate(model, ids * mask, use_cache=False, **kwargs))


def test_sampling_with_cache_is_sampling_without(model, ids, mask):
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        kwargs = {"do_sample": True, "top_k": 20, "use_cache": use_cache}
        sampled.append(generate(model, ids * mask, attention_mask=mask, **kwargs))
    assert torch.equal(*sampled) and sampled[0].shape == (2, NEW)


@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_a_prefill_in_calls_of_any_size_is_one_prefill(model, ids, mask, padded):
    model.double()
    mask = mask if padded else torch.ones_like(mask)
    whole = model(ids, attention_mask=mask, use_cache=True)
    cache, logits = None, []
    for start, end in ((0, 4), (4, 5), (5, 15), (15, 26), (26, 27)):
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert cache.get_seq_length() == LENGTH
    exact(torch.cat(logits, dim=1)[mask.bool()], whole.logits[mask.bool()])
    for ours, theirs in zip(cache.layers, whole.past_key_values.layers, strict=True):
        if isinstance(ours, StateLayer):
            exact(ours.state, theirs.state)
    alone = model(ids[1:, 13 * padded :], use_cache=False).logits
    exact(torch.cat(logits, dim=1)[1:, 13 * padded :], alone)


@torch.no_grad()
def test_nothing_but_the_cache_lives_between_calls(model, ids):
    """However many calls, each layer holds one state, or its keys and values, and no memory beside them."""
    held = []
    for size in (9, 3):
        cache = None
        for part in ids.split(size, dim=1):
            cache = model(part, past_key_values=cache, use_cache=True).past_key_values
        for layer in cache.layers:
            state = layer.state if isinstance(layer, StateLayer) else (layer.keys, layer.values)
            for x in state if isinstance(state, tuple) else (state,):
                assert x.untyped_storage().nbytes() == x.nbytes and x.grad_fn is None
                if isinstance(layer, StateLayer):
                    assert x.shape[0] == 2 and LENGTH not in x.shape
                else:
                    assert x.shape[2] == (4 if isinstance(layer, WindowLayer) else LENGTH)
        held.append(_bytes(cache))
    assert held[0] == held[1] > 0


def _bytes(cache):
    """The bytes of all tensors that a cache's layers refer to."""
    tensors = [x for layer in cache.layers for value in vars(layer).values() for x in _tensors(value)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for x in value:
            yield from _tensors(x)


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_documents_are_each_alone(model, ids, batch):
    """By their positions and by their bounds: logits, gradients, and nothing that passes from one to the next."""
    model.double()
    ids = ids[:batch]
    bounds = torch.tensor([0, 1, 14, LENGTH, LENGTH + 9, 2 * LENGTH][: 4 if batch == 1 else 6], dtype=torch.int32)
    documents = ids.flatten().tensor_split(bounds[1:-1].long())
    positions = torch.cat([torch.arange(len(d)) for d in documents]).view(batch, LENGTH)

    alone = torch.cat([model(d[None]).logits[0] for d in documents]).view(batch, LENGTH, -1)
    expected = gradients(model, alone.square().mean())
    packed = model(ids, position_ids=positions).logits
    exact(packed, alone)
    exact(gradients(model, packed.square().mean()), expected)

    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    by_bounds = model(inputs_embeds=embedded, cu_seq_lens_q=bounds).logits
    exact(by_bounds, alone)
    (from_third,) = torch.autograd.grad(by_bounds.flatten(0, 1)[14:LENGTH].sum(), embedded)
    reached = from_third.flatten(0, 1).abs().sum(-1) > 0
    assert reached[14:LENGTH].all() and not reached[:14].any() and not reached[LENGTH:].any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, ids, mask, use_reentrant):
    model.double().train()
    expected = gradients(model, model(ids, attention_mask=mask, labels=ids).loss)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in expected.values())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    exact(gradients(model, model(ids, attention_mask=mask, labels=ids).loss), expected)


def test_saved_and_loaded_again_it_is_the_same(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert loaded.config.mixer_types == model.config.mixer_types
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_hidden_states_are_those_of_every_layer(model, ids):
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == len(model.config.mixer_types) + 1
    close(model.lm_head(output.hidden_states[-1]), output.logits)


@pytest.mark.parametrize("autocast", [True, False])
def test_in_half_precision_it_trains_and_generates(model, ids, mask, autocast):
    expected = model.train()(ids, attention_mask=mask, labels=ids).loss
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, attention_mask=mask, labels=ids).loss
        assert all(g.isfinite().all() for g in gradients(model, loss).values())
        generated = generate(model.eval(), ids * mask, attention_mask=mask)
        cache = model(ids, use_cache=True).past_key_values
    torch.testing.assert_close(loss.float(), expected, rtol=0.1, atol=0)
    assert generated.shape == (2, NEW)
    states = [x for layer in cache.layers if isinstance(layer, StateLayer) for x in _tensors(layer.state)]
    assert all(x.dtype == torch.float32 for x in states if x.is_floating_point())


class Stored(torch.nn.Linear):
    """A linear layer with weights in 8 bits, as bitsandbytes has them: their dtype is no precision to compute in."""

    def __init__(self, layer, storage):
        super().__init__(1, 1, bias=False)
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.zero = 128 if storage == torch.uint8 else 0
        stored = (layer.weight.detach() / self.scale).round() + self.zero
        self.weight, self.bias = torch.nn.Parameter(stored.to(storage), requires_grad=False), layer.bias

    def wide(self):
        """The weights that the products have."""
        return (self.weight.float() - self.zero) * self.scale

    def forward(self, x):
        assert x.is_floating_point()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return torch.nn.functional.linear(x.to(dtype), self.wide().to(dtype), self.bias)


@pytest.mark.parametrize("storage", [torch.int8, torch.uint8], ids=["int8", "uint8"])
@torch.no_grad()
def test_weights_are_stored_in_another_precision_than_products_have(model, ids, mask, storage):
    """Under autocast it computes what it would with plain weights, as near to float32 as a model in bfloat16 is."""
    plain = copy.deepcopy(model)
    linear = [name for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in linear:
        layer, (parent, _, last) = model.model.layers.get_submodule(name), name.rpartition(".")
        stored = Stored(layer, storage)
        plain.model.layers.get_submodule(name).weight.copy_(stored.wide())
        setattr(model.model.layers.get_submodule(parent), last, stored)
    expected = plain(ids, attention_mask=mask).logits.float().log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        found, same = (m(ids, attention_mask=mask).logits.float().log_softmax(-1) for m in (model, plain))
    half = plain.bfloat16()(ids, attention_mask=mask).logits.float().log_softmax(-1)
    torch.testing.assert_close(found, same)
    assert divergence(expected, found) <= 2 * divergence(expected, half)


def divergence(p, q):
    """KL(p || q) of log-probabilities, a mean over tokens."""
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_it_trains_after_inference(make_model, ids):
    """What a mixer keeps from inference mode must not be in the way of gradients. Heads that no other test has."""
    model = make_model(num_attention_heads=6, num_key_value_heads=3)
    with torch.inference_mode():
        model(ids)
    model.train()
    assert all(g.isfinite().all() for g in gradients(model, model(ids, labels=ids).loss).values())


def test_a_copy_is_a_model_of_its_own(model, ids):
    other = copy.deepcopy(model)
    assert torch.equal(other(ids).logits, model(ids).logits)
    torch.nn.init.zeros_(other.model.layers[0].self_attn.o_proj.weight)
    assert not torch.equal(other(ids).logits, model(ids).logits)
