"""Softmax attention by every implementation that can run here: speed at real shapes, and the error against float64.

python -m benchmarks.attention [--implementations sdpa cudnn ...] [--repeats 20]

The layer's own call is measured, from q, k and v to the output, as the host launches it. TFLOP/s count the products of
causal attention: two forward, four backward, of each document's T^2 / 2 pairs of tokens. Recomputation does not count.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import PACKAGES, header, milliseconds_in_turn, peak_gib, table
from halo.errors import first_line
from halo.models.attention import IMPLEMENTATIONS, PLAIN, choose, refusal, shape_of
from halo.models.attention_functions import registered
from hypenet import HypeNetConfig
from hypenet.mixers import build_mixer

NEEDED = (*PACKAGES, "nvidia-cudnn-cu13", "flash-attn", "flash_attn_3", "flash-attn-4", "nvidia-cutlass-dsl")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows of attention: [batch, tokens, heads, width]."""

    name: str
    batch: int
    tokens: int
    heads: int = 16
    kv_heads: int = 8
    width: int = 128
    documents: int = 0
    """Packed documents of a row, of random lengths. 0: a row is one document."""

    def config(self) -> HypeNetConfig:
        return HypeNetConfig(
            hidden_size=self.heads * self.width,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.width,
            num_hidden_layers=1,
            mixer_types=["attn"],
        )

    def bounds(self) -> Tensor:
        """[documents + 1] in int32: where each begins in the B x T tokens, and the end."""
        cuts = list(range(0, self.batch * self.tokens + 1, self.tokens))
        draw = torch.Generator().manual_seed(self.tokens)
        for row in range(self.batch if self.documents else 0):
            within = torch.randperm(self.tokens - 1, generator=draw)[: self.documents - 1] + 1
            cuts += (row * self.tokens + within).tolist()
        return torch.tensor(sorted(cuts), dtype=torch.int32)

    def flops(self) -> float:
        """Of the forward."""
        pairs = float(self.bounds().diff().double().square().sum()) / 2
        return 4 * pairs * self.heads * self.width


CASES = (
    Case(name="stage 2 of 1.7B", batch=12, tokens=512),
    Case(name="stage 2 of 135M", batch=96, tokens=512, heads=9, kv_heads=3, width=64),
    Case(name="stage 3 of 1.7B", batch=1, tokens=16_384),
    Case(name="stage 3 of 1.7B, 16 documents", batch=1, tokens=16_384, documents=16),
    Case(name="stage 3 of 8B", batch=1, tokens=16_384, heads=32),
    Case(name="128K of 1.7B", batch=1, tokens=131_072),
)
SMALL = (Case(name="small", batch=2, tokens=411), Case(name="small, 5 documents", batch=2, tokens=411, documents=5))
"""No block size divides 411."""

Call = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(header(NEEDED))
    running = []
    for name in args.implementations:
        if reason := refusal(name, shape_of(CASES[0].config(), 512)):
            print(f"{name} does not run: {reason}")
        else:
            running.append(name)
    print("\nThe largest error of the output and of the gradients in bf16, as a share of their norm in float64\n")
    print(table(["", *running], [[case.name, *(error_of(name, case) for name in running)] for case in SMALL]))
    print("\nForward, forward and backward: ms and TFLOP/s; GiB of both beyond the inputs; seconds of the first call\n")
    columns = ["", "implementation", "ms", "TFLOP/s", "ms, both", "TFLOP/s, both", "GiB", "first call, s"]
    print(table(columns, []), flush=True)
    for case in CASES:
        for row in speeds(running, case, args.repeats):
            print(table([], [row]).splitlines()[-1], flush=True)


def inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient, in the layout that a layer gives them."""
    torch.manual_seed(0)
    heads = (case.heads, case.kv_heads, case.kv_heads)
    draw = partial(torch.randn, device="cuda", dtype=torch.float32)
    qkv = [draw(case.batch, case.tokens, n, case.width).bfloat16().to(dtype).transpose(1, 2) for n in heads]
    grad = draw(case.batch, case.tokens, case.heads, case.width).bfloat16().to(dtype)
    return [*(x.requires_grad_() for x in qkv), grad]


def call_of(name: str, case: Case, qkv: list[Tensor]) -> Call:
    config = case.config()
    config._attn_implementation = registered(name)
    mixer: Any = build_mixer(config, 0)
    packed: dict[str, Any] = {}
    if case.documents:
        bounds = case.bounds()
        packed = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
        packed |= dict.fromkeys(("max_length_q", "max_length_k"), int(bounds.diff().max()))
    return lambda: mixer.attend(*qkv, None, **packed)[0]


def error_of(name: str, case: Case) -> float | str:
    found = []
    for implementation, dtype in ((PLAIN, torch.float64), (name, torch.bfloat16)):
        *qkv, grad = inputs(case, dtype)
        try:
            output = call_of(implementation, case, qkv)()
            found.append([output.detach().double(), *(x.double() for x in torch.autograd.grad(output, qkv, grad))])
        except (RuntimeError, ImportError) as error:
            return first_line(error)[:60]
    return max(float((x - y).norm() / y.norm()) for x, y in zip(found[1], found[0], strict=True))


def speeds(names: list[str], case: Case, repeats: int) -> list[list[Any]]:
    """The table's rows of a case. What `auto` takes has a star."""
    *qkv, grad = inputs(case, torch.bfloat16)
    taken = choose(shape_of(case.config(), case.tokens, case.documents > 0))
    calls: dict[str, Call] = {}
    both: dict[str, Call] = {}
    more: dict[str, tuple[float, float]] = {}
    rows: list[list[Any]] = []
    for name in names:
        call = call_of(name, case, qkv)
        run = partial(_forward_and_backward, call, qkv, grad)
        begin = time.perf_counter()
        try:
            run()
            torch.cuda.synchronize()
        except (RuntimeError, ImportError) as error:
            rows.append([case.name, name, first_line(error)[:60], *[""] * 5])
            continue
        more[name] = (time.perf_counter() - begin, peak_gib(run))
        calls[name], both[name] = call, run
    with torch.no_grad():
        forward = milliseconds_in_turn(calls, repeats=repeats)
    trained = milliseconds_in_turn(both, repeats=repeats)
    for name in calls:
        rates = (case.flops() / forward[name] / 1e9, 3 * case.flops() / trained[name] / 1e9)
        first, peak = more[name]
        star = " *" if name == taken else ""
        rows.append([case.name, name + star, forward[name], rates[0], trained[name], rates[1], peak, first])
    return rows


def _forward_and_backward(call: Call, qkv: list[Tensor], grad: Tensor) -> Tensor:
    return torch.autograd.grad(call(), qkv, grad)[0]


if __name__ == "__main__":
    main()
