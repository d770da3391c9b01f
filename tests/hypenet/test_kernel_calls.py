"""What each RNN mixer hands to fla's kernels, and when: on the CPU, with plain torch in their place."""

import importlib
import inspect
import math
from itertools import pairwise

import pytest
import torch

from hypenet import kernels
from hypenet.cache import HypeNetCache
from hypenet.delta_rule import delta_rule_chunked
from hypenet.linear_attention import by_token, linear_attention_chunked, widen
from hypenet.mixer_gsa import gsa_chunked
from hypenet.mixers import MIXERS
from tests.hypenet.sizes import SIZES

B, T = 2, 20
H, D, HIDDEN = (SIZES[name] for name in ("num_attention_heads", "head_dim", "hidden_size"))
SLOTS = 6

NO_DECAY, FIXED, BY_HEAD = {}, {"g_gamma": (H,)}, {"g": (B, T, H)}
BY_CHANNEL, BY_SLOT = {"g": (B, T, H, D)}, {"g": (B, T, H, SLOTS)}
CALLS = {
    "linear-attn": ("simple_gla.chunk_simple_gla", NO_DECAY),
    "lightning-attn": ("simple_gla.chunk_simple_gla", FIXED),
    "retnet": ("simple_gla.chunk_simple_gla", FIXED),
    "mamba2": ("simple_gla.chunk_simple_gla", BY_HEAD),
    "gla": ("gla.chunk_gla", BY_CHANNEL),
    "hgrn2": ("gla.chunk_gla", BY_CHANNEL),
    "gsa": ("gsa.chunk_gsa", BY_SLOT),
    "deltanet": ("delta_rule.chunk_delta_rule", NO_DECAY),
    "gdn": ("gated_delta_rule.chunk_gated_delta_rule", BY_HEAD),
    "kda": ("kda.chunk_kda", BY_CHANNEL),
    "rwkv7": ("rwkv7.chunk_rwkv7", {"w": (B, T, H, D)}),
}
"""Of each mixer, the operation of fla, and the shape of the log-decays by the name fla has for them."""
MISCOMPILED = {"mamba2", "gdn"}
"""The mixers with a gate a token and head."""
LOG_DECAYS = {"g", "g_gamma", "w"}


# fla's operations: their names and parameters, and what they compute.


def plain(form, inputs, *, scale, initial_state, output_final_state, cu_seqlens):
    if cu_seqlens is None:
        output, state = form(*inputs, scale=scale, state=initial_state)
        return output, state if output_final_state else None
    assert initial_state is None and not output_final_state
    outputs = []
    for begin, end in pairwise(cu_seqlens.tolist()):
        document = (x if x is None or x.ndim == 1 else x[:, begin:end] for x in inputs)
        outputs.append(form(*document, scale=scale)[0])
    return torch.cat(outputs, dim=1), None


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, **carried):
    return plain(linear_attention_chunked, (q, k, v, g_gamma if g is None else g), **carried)


def chunk_gla(q, k, v, g, **carried):
    return plain(linear_attention_chunked, (q, k, v, g), **carried)


def chunk_gsa(q, k, v, s, g, **carried):
    torch.testing.assert_close(s.float(), 1 - g.exp(), rtol=1e-2, atol=1e-4)
    output, state = plain(gsa_chunked, (q, k, v, g), **carried)
    return output, state or (None, None)


def chunk_delta_rule(q, k, v, beta, **carried):
    return chunk_gated_delta_rule(q, k, v, None, beta, **carried)


def chunk_gated_delta_rule(q, k, v, g, beta, **carried):
    write = widen(beta)[..., None] * k
    read = k if g is None else by_token(g, q).exp() * k
    return plain(delta_rule_chunked, (q, write, v, read, -write, g), **carried)


def chunk_kda(q, k, v, g, beta, **carried):
    return chunk_gated_delta_rule(q, k, v, g, beta, **carried)


def chunk_rwkv7(r, w, k, v, a, b, *, lower_bound, **carried):
    assert lower_bound == -math.exp(-0.5) and (w >= lower_bound).all()
    return plain(delta_rule_chunked, (r, k, v, a, b, w), **carried)


OPERATIONS = {
    "simple_gla.chunk_simple_gla": chunk_simple_gla,
    "gla.chunk_gla": chunk_gla,
    "gsa.chunk_gsa": chunk_gsa,
    "delta_rule.chunk_delta_rule": chunk_delta_rule,
    "gated_delta_rule.chunk_gated_delta_rule": chunk_gated_delta_rule,
    "kda.chunk_kda": chunk_kda,
    "rwkv7.chunk_rwkv7": chunk_rwkv7,
}


class Kernels:
    """fla in place: `calls` are the operations' names and what they were given, by name."""

    def __init__(self):
        self.calls = []
        self.there = True

    def serves(self, x):
        return self.there and x.dtype == torch.bfloat16

    def kernel(self, operation, *, state):
        def call(*args, **kwargs):
            given = inspect.signature(OPERATIONS[operation]).bind(*args, **kwargs).arguments
            self.calls.append((operation, given | given.pop("carried")))
            return OPERATIONS[operation](*args, **kwargs)

        return call


@pytest.fixture
def fla(monkeypatch):
    in_place = Kernels()
    for module in ("linear_attention", "delta_rule", "mixer_gsa"):
        monkeypatch.setattr(f"hypenet.{module}.serves", in_place.serves)
        monkeypatch.setattr(f"hypenet.{module}.kernel", in_place.kernel)
    monkeypatch.setattr(kernels, "_hopper", lambda device: False)
    return in_place


@pytest.fixture(params=list(CALLS))
def name(request):
    return request.param


@pytest.fixture
def make_model(make_hybrid):
    """A function from a mixer's name to a model of it in float32."""

    def make(name):
        options = {"gsa": {"slots": SLOTS}} if name == "gsa" else {}
        return make_hybrid(mixer_types=[name] * 4, mixer_options=options)

    return make


@pytest.fixture
def model(make_model, name):
    return make_model(name).bfloat16()


@pytest.fixture
def x():
    return torch.randn(B, T, HIDDEN, generator=torch.Generator().manual_seed(5)).bfloat16()


def run(model, x, start=0, layer=2, **kwargs):
    positions = torch.arange(start, start + x.shape[1])[None]
    return model.model.layers[layer].self_attn(x, model.model.rotary_emb(x, positions), **kwargs)[0]


def with_gradients(model, x, **kwargs):
    mixer = model.model.layers[2].self_attn
    output = run(model, x, **kwargs)
    return output, *torch.autograd.grad(output.float().sin().sum(), list(mixer.parameters()))


def assert_given(name, call, *, batch=B, length=T, state=None, keep_state=False, cu_seqlens=None):
    """Everything that the kernel of mixer `name` gets: its tensors' dtypes and shapes, and the rest."""
    operation, given = call
    expected_operation, decays = CALLS[name]
    assert operation == expected_operation
    given = dict(given)
    assert given.pop("scale") == (1.0 if name == "rwkv7" else D**-0.5)
    assert given.pop("initial_state") is state
    assert given.pop("output_final_state") is keep_state
    assert given.pop("cu_seqlens") is cu_seqlens
    given.pop("lower_bound", None)
    log_decays = {n: given.pop(n) for n in LOG_DECAYS & given.keys()}
    assert all(g.dtype == torch.float32 for g in log_decays.values())
    expected = {n: (batch, length, *s[2:]) if len(s) > 1 else s for n, s in decays.items()}
    assert {n: tuple(g.shape) for n, g in log_decays.items()} == expected
    widths = {"beta": (H,), "s": (H, SLOTS)}
    assert {n: tuple(y.shape) for n, y in given.items()} == {n: (batch, length, *widths.get(n, (H, D))) for n in given}
    assert {n: y.dtype for n, y in given.items()} == dict.fromkeys(given, torch.bfloat16)


def test_every_rnn_mixer_is_tested():
    """TTT has no kernel; attention has its own."""
    assert CALLS.keys() | {"ttt"} == MIXERS.keys() - {"attn", "swa"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_installed_fla_has_these_parameters(operation):
    pytest.importorskip("fla.ops")
    module, _, function = operation.partition(".")
    theirs = list(inspect.signature(getattr(importlib.import_module(f"fla.ops.{module}"), function)).parameters)
    ours = inspect.signature(OPERATIONS[operation]).parameters.values()
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = {p.name for p in ours if p.kind is p.KEYWORD_ONLY}
    assert theirs[: len(positional)] == positional
    assert by_name | {"scale", "initial_state", "output_final_state", "cu_seqlens"} <= set(theirs)


def test_training(fla, model, name, x):
    results = with_gradients(model.train(), x)
    (call,) = fla.calls
    assert_given(name, call)
    fla.there = False
    torch.testing.assert_close(results, with_gradients(model, x))
    assert len(fla.calls) == 1


def test_training_under_autocast(fla, make_model, name, x):
    """What products take is in half precision also where weights are in single. Log-decays are not, and beta may be."""
    model = make_model(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        run(model, x.float()).sum().backward()
    ((_, given),) = fla.calls
    tensors = {n: y for n, y in given.items() if isinstance(y, torch.Tensor)}
    assert {n for n, y in tensors.items() if y.dtype == torch.float32} == set(CALLS[name][1])


def test_packed_documents_are_one_call(fla, model, name, x):
    bounds = torch.tensor([0, 5, 6, T, 2 * T], dtype=torch.int32)
    results = with_gradients(model.train(), x, cu_seq_lens_q=bounds)
    (call,) = fla.calls
    assert_given(name, call, batch=1, length=B * T, cu_seqlens=bounds)
    fla.there = False
    for result, expected in zip(results, with_gradients(model, x, cu_seq_lens_q=bounds), strict=True):
        assert (result - expected).norm() <= 0.02 * expected.norm()  # gradients of documents are added in bfloat16


@torch.no_grad()
def test_a_cache_is_continued_and_one_token_needs_no_kernel(fla, model, name, x):
    def in_parts():
        """The output, and the state after each part."""
        cache, outputs, states = HypeNetCache(model.config), [], []
        for begin, end in ((0, 9), (9, 19), (19, 20)):
            outputs.append(run(model, x[:, begin:end], begin, past_key_values=cache))
            states.append(cache.state(2))
        return torch.cat(outputs, dim=1), states

    output, states = in_parts()
    first, second = fla.calls
    assert_given(name, first, length=9, keep_state=True)
    assert_given(name, second, length=10, state=states[0], keep_state=True)
    for state in states:
        assert all(s.dtype == torch.float32 for s in (state if isinstance(state, tuple) else [state]))
    fla.there = False
    torch.testing.assert_close((output, states), in_parts())


def test_one_token_alone_needs_no_kernel(fla, model, x):
    run(model.train(), x[:, :1]).sum().backward()
    assert not fla.calls


def test_ttt_needs_no_kernel(fla, make_model, x):
    model = make_model("ttt").bfloat16()
    run(model, x, past_key_values=HypeNetCache(model.config))
    run(model, x, cu_seq_lens_q=torch.tensor([0, 5, T, 2 * T], dtype=torch.int32))
    assert not fla.calls


@pytest.fixture
def old_triton(monkeypatch, fla):
    """On a Hopper GPU, without tilelang."""
    find_spec = importlib.util.find_spec
    kernels._triton_miscompiles.cache_clear()
    monkeypatch.setattr(kernels, "_hopper", lambda device: True)
    monkeypatch.setattr(kernels, "_triton_version", lambda: "3.6.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *args: None if n == "tilelang" else find_spec(n, *args))
    yield
    kernels._triton_miscompiles.cache_clear()


@pytest.mark.usefixtures("old_triton")
@pytest.mark.parametrize("packed", [True, False])
def test_a_triton_that_computes_wrong_gradients_is_refused_where_it_would(fla, model, name, x, packed):
    documents = {"cu_seq_lens_q": torch.tensor([0, 5, T, 2 * T], dtype=torch.int32)} if packed else {}
    with torch.no_grad():
        run(model, x, **documents)
    assert len(fla.calls) == 1
    if name in MISCOMPILED:
        with pytest.raises(RuntimeError, match=r"^triton 3\.6\.0 computes wrong gradients .*$"):
            run(model, x, **documents)
        assert len(fla.calls) == 1
    else:
        run(model, x, **documents).sum().backward()
        assert len(fla.calls) == 2
