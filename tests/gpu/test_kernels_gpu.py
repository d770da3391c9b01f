"""fla's kernels, as the mixers call them, against the recurrences in float64: forward, state and gradients.

The first call of a kernel with a head size autotunes, for minutes in all; fla keeps what it found on the disk.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from hypenet import HypeNetConfig, HypeNetForCausalLM
from hypenet.delta_rule import delta_rule, rwkv7
from hypenet.kernels import serves
from hypenet.linear_attention import linear_attention
from hypenet.mixer_gsa import gsa
from hypenet.mixer_lightning import lightning_log_decay
from hypenet.mixers import MIXERS
from tests.hypenet.sizes import SIZES

pytest.importorskip("fla")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(1200),
]

TOLERANCE = 0.01
"""Of the norm. bf16 keeps 8 bits: 0.2% of each number that is read, and as much of each intermediate product."""

B, T, H = 2, 203, 3  # no block size divides 203


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def decay(*shape: int) -> torch.Tensor:
    """Log-decays of gates as they are at the start of training: some forget at once, some hardly."""
    return F.logsigmoid(3 * normal(*shape)) / 4


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=-1)


def of_linear_attention(form: str) -> Callable[[int], tuple[Callable, dict[str, torch.Tensor]]]:
    def case(dim: int) -> tuple[Callable, dict[str, torch.Tensor]]:
        gate = {
            "none": lambda: None,
            "fixed": lambda: lightning_log_decay(H, torch.device("cuda")),
            "head": lambda: decay(B, T, H),
            "channel": lambda: decay(B, T, H, dim),
        }[form]()
        return linear_attention, {**qkv(dim), "log_decay": gate}

    return case


def of_delta_rule(form: str) -> Callable[[int], tuple[Callable, dict[str, torch.Tensor]]]:
    def case(dim: int) -> tuple[Callable, dict[str, torch.Tensor]]:
        gate = {"none": lambda: None, "head": lambda: decay(B, T, H), "channel": lambda: decay(B, T, H, dim)}[form]()
        inputs = qkv(dim)
        inputs |= {name: unit(inputs[name]) for name in "qk"}
        return delta_rule, {**inputs, "beta": 2 * torch.rand(B, T, H, device="cuda"), "log_decay": gate}

    return case


def of_gsa(dim: int) -> tuple[Callable, dict[str, torch.Tensor]]:
    return gsa, {**qkv(dim), "log_decay": decay(B, T, H, 64)}


def of_rwkv7(dim: int) -> tuple[Callable, dict[str, torch.Tensor]]:
    kappa = unit(normal(B, T, H, dim))
    inputs = {**qkv(dim), "a": -kappa, "b": kappa * torch.rand(B, T, H, dim, device="cuda")}
    return rwkv7, {**inputs, "log_decay": -(torch.rand(B, T, H, dim, device="cuda") * 0.6)}


def qkv(dim: int) -> dict[str, torch.Tensor]:
    return {name: normal(B, T, H, dim) for name in "qkv"}


CASES = {
    "linear attention": of_linear_attention("none"),
    "Lightning, RetNet": of_linear_attention("fixed"),
    "Mamba2": of_linear_attention("head"),
    "GLA, HGRN-2": of_linear_attention("channel"),
    "GSA": of_gsa,
    "DeltaNet": of_delta_rule("none"),
    "GDN": of_delta_rule("head"),
    "KDA": of_delta_rule("channel"),
    "RWKV-7": of_rwkv7,
}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def run(function: Callable, inputs: dict[str, torch.Tensor | None], gradient: torch.Tensor, **carried):
    """(output, states, gradients by name)."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None}
    output, state = function(**{**inputs, **leaves}, scale=inputs["q"].shape[-1] ** -0.5, keep_state=True, **carried)
    names = [name for name in leaves if leaves[name].ndim > 1]  # a fixed decay is not learnt
    gradients = torch.autograd.grad(output, [leaves[name] for name in names], gradient.to(output.dtype))
    return output, state if isinstance(state, tuple) else (state,), dict(zip(names, gradients, strict=True))


def rounded(inputs: dict[str, torch.Tensor | None], dtype: torch.dtype = torch.bfloat16):
    """What the kernels take in half precision, and the log-decays in float32."""
    return {name: x if x is None or name == "log_decay" else x.to(dtype) for name, x in inputs.items()}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_output_state_and_gradients(case, dim):
    torch.manual_seed(0)
    function, inputs = CASES[case](dim)
    inputs = rounded(inputs)
    assert serves(inputs["q"])
    gradient = normal(B, T, H, dim).bfloat16()
    output, states, gradients = run(function, inputs, gradient)

    exact = {name: None if x is None else x.double() for name, x in inputs.items()}
    expected, expected_states, expected_gradients = run(function, exact, gradient.double())
    assert output.dtype == torch.bfloat16 and all(state.dtype == torch.float32 for state in states)
    errors = {"output": relative_error(output, expected)}
    errors |= {f"state {i}": relative_error(*pair) for i, pair in enumerate(zip(states, expected_states, strict=True))}
    errors |= {f"d {name}": relative_error(gradients[name], expected_gradients[name]) for name in gradients}
    print(case, dim, {name: f"{error:.4f}" for name, error in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("case", ["Lightning, RetNet", "DeltaNet"])
def test_output_and_state_in_float16(case):
    torch.manual_seed(0)
    function, inputs = CASES[case](64)
    inputs = rounded(inputs, torch.float16)
    assert serves(inputs["q"])
    output, state = function(**inputs, scale=0.125, keep_state=True)
    exact = {name: None if x is None else x.double() for name, x in inputs.items()}
    expected, expected_state = function(**exact, scale=0.125, keep_state=True)
    assert (output.dtype, state.dtype) == (torch.float16, torch.float32)
    assert relative_error(output, expected) < TOLERANCE
    assert relative_error(state, expected_state) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_packed_documents_are_those_of_each_alone(case):
    """Two documents, of 70 tokens and of 336: by one call with their bounds, and by a call each."""
    torch.manual_seed(0)
    function, inputs = CASES[case](64)
    packed = {n: x if x is None or x.ndim < 3 else x.flatten(0, 1)[None] for n, x in rounded(inputs).items()}
    gradient = normal(1, B * T, H, 64).bfloat16()
    bounds = [0, 70, B * T]
    cu_seqlens = torch.tensor(bounds, device="cuda", dtype=torch.int32)  # as the model has them
    output, states, gradients = run(function, packed, gradient, cu_seqlens=cu_seqlens)

    alone = []
    for begin, end in pairwise(bounds):
        document = {n: x if x is None or x.ndim < 3 else x[:, begin:end] for n, x in packed.items()}
        alone.append(run(function, document, gradient[:, begin:end]))
    outputs, states_alone, gradients_alone = zip(*alone, strict=True)
    errors = {"output": relative_error(output, torch.cat(outputs, dim=1).double())}
    for i, state in enumerate(states):
        errors[f"state {i}"] = relative_error(state, torch.cat([each[i] for each in states_alone]).double())
    for name in gradients:
        expected = torch.cat([each[name] for each in gradients_alone], dim=1)
        errors[f"d {name}"] = relative_error(gradients[name], expected.double())
    print(case, {name: f"{error:.4f}" for name, error in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("case", CASES)
def test_a_sequence_in_parts_is_the_sequence(case):
    """Prefill, another chunk from the state of the first, then one token."""
    torch.manual_seed(0)
    function, inputs = CASES[case](64)
    inputs = rounded(inputs)

    def call(begin: int, end: int, state):
        part = {n: x if x is None or x.ndim < 3 else x[:, begin:end] for n, x in inputs.items()}
        return function(**part, scale=0.125, keep_state=True, state=state)

    whole, final = call(0, T, None)
    state, parts = None, []
    for begin, end in ((0, 130), (130, T - 1), (T - 1, T)):
        output, state = call(begin, end, state)
        parts.append(output)
    assert relative_error(torch.cat(parts, dim=1), whole.double()) < TOLERANCE
    for part, expected in zip(*(s if isinstance(s, tuple) else (s,) for s in (state, final)), strict=True):
        assert relative_error(part, expected.double()) < TOLERANCE


def model(mixers: list[str]) -> HypeNetForCausalLM:
    keys = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    keys |= {"initializer_range": 0.02, "num_hidden_layers": len(mixers), "mixer_types": mixers}
    torch.manual_seed(0)
    return HypeNetForCausalLM(HypeNetConfig(**{**SIZES, **keys})).cuda().bfloat16()


def test_a_bfloat16_model_of_all_mixers_trains_and_generates():
    every = model(sorted(MIXERS))
    tokens = torch.randint(1, 61, (2, 300), device="cuda")
    every.train()(tokens, labels=tokens).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in every.parameters())
    generated = every.eval().generate(tokens, max_new_tokens=5, do_sample=False)
    assert generated.shape == (2, 305)


@pytest.mark.parametrize("name", sorted(set(MIXERS) - {"attn", "swa"}))
def test_packed_documents_are_each_alone(name):
    lengths = (70, 1, 129)
    packed = model([name, "attn"]).eval()
    tokens = torch.randint(1, 61, (1, sum(lengths)), device="cuda")
    positions = torch.cat([torch.arange(n, device="cuda") for n in lengths])[None]
    together = packed(tokens, position_ids=positions).logits
    alone = torch.cat([packed(x).logits for x in tokens.split(lengths, dim=1)], dim=1)
    assert relative_error(together, alone.double()) < 0.02


@torch.no_grad()
def test_a_left_padded_row_is_the_row_alone():
    """Logits of the prompts and of one token more, within 2% of the norm: in bf16 chunks begin at other tokens."""
    hybrid = model(["lightning-attn", "attn"]).eval()
    tokens = torch.randint(1, 61, (2, 301), device="cuda")
    mask = torch.ones_like(tokens)
    mask[1, :170] = 0
    prompts = hybrid((tokens * mask)[:, :300], attention_mask=mask[:, :300], use_cache=True)
    more = hybrid(tokens[:, 300:], attention_mask=mask, past_key_values=prompts.past_key_values)
    batch = torch.cat([prompts.logits, more.logits], dim=1)
    for row, begin in enumerate((0, 170)):
        alone = hybrid(tokens[row : row + 1, begin:]).logits
        assert relative_error(batch[row : row + 1, begin:], alone.double()) < 0.02


def test_chunked_prefill_takes_no_more_memory_with_more_chunks():
    """Beside the cache, which holds the same at the end however it was filled."""
    hybrid = model(["lightning-attn", "attn", "lightning-attn", "lightning-attn"]).eval()
    tokens = torch.randint(1, 61, (1, 32_768), device="cuda")
    peaks = []
    for chunk in (2048, 1024, 512):
        torch.cuda.reset_peak_memory_stats()
        hybrid.generate(tokens, max_new_tokens=1, do_sample=False, prefill_chunk_size=chunk)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= peaks[1] <= peaks[0], peaks
