"""The fused losses of stages 2 and 3 at Qwen3's vocabulary: loss and both gradients, in bf16.

python -m benchmarks.losses kl [--tokens 6144]                 stage 2's, beside other implementations
python -m benchmarks.losses cross_entropy [--tokens 16384]     stage 3's, beside plain torch
python -m benchmarks.losses sizes {kl,cross_entropy}           either, by the constants that cut its work; the best last

Each takes --words (151936) and --width (2048) too.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import header, milliseconds_in_turn, peak_gib, table
from halo.errors import first_line
from halo.losses.linear_kl import LIVE_NUMBERS, Terms, linear_kl
from halo.losses.linear_kl_kernel import kl_rows_triton
from halo.teacher.logits import FactoredLogits
from hypenet import loss_kernels, losses

Loss = Callable[..., Tensor]
"""(hidden, head, other inputs) -> the mean over tokens."""


@dataclass(frozen=True)
class Shape:
    tokens: int
    words: int
    width: int

    def draw(self) -> tuple[Tensor, Tensor]:
        """Hidden states and a head, whose logits are of about Qwen3's size."""
        draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        return draw(self.tokens, self.width), draw(self.words, self.width) * (self.width**-0.5 * 2.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, tokens in TOKENS.items():
        command = commands.add_parser(name)
        command.add_argument("--tokens", type=int, default=tokens)
    sizes_parser = commands.add_parser("sizes")
    sizes_parser.add_argument("loss", choices=[*TOKENS])
    sizes_parser.add_argument("--tokens", type=int)
    sizes_parser.add_argument("--lanes", nargs="+", default=["2048x8", "4096x16", "4096x32", "8192x32"])
    sizes_parser.add_argument("--mib", type=int, nargs="+", default=[900, 1350, 2700])
    sizes_parser.add_argument("--gradient", type=int, nargs="+", default=[2, 4])
    for command in commands.choices.values():
        command.add_argument("--words", type=int, default=151_936)
        command.add_argument("--width", type=int, default=2048)
    args = parser.parse_args()
    print(header())
    torch.manual_seed(0)
    name = args.loss if args.command == "sizes" else args.command
    shape = Shape(args.tokens or TOKENS[name], args.words, args.width)
    if args.command == "sizes":
        sizes(name, shape, args)
    else:
        {"kl": kl, "cross_entropy": cross_entropy}[name](shape)


TOKENS = {"kl": 6144, "cross_entropy": 16_384}
"""A micro-batch of stage 2 (12 x 512), and a sequence of stage 3."""


# Each loss beside others


def kl(shape: Shape) -> None:
    inputs = inputs_of("kl", shape)
    alone = {
        "the four matrix products alone": partial(products, *inputs),
        "the rows alone": partial(kl_rows_alone, *inputs),
    }
    compare(alone, kl_losses(), inputs, kl_reference)


def cross_entropy(shape: Shape) -> None:
    inputs = inputs_of("cross_entropy", shape)
    alone = {
        "the three matrix products alone": partial(products, *inputs[:2]),
        "the rows alone": partial(cross_entropy_rows_alone, *inputs),
    }

    def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        with replaced((losses, "fused_kernel_serves", lambda x: False)):
            return losses.linear_cross_entropy(hidden, head, labels)

    def full(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((hidden @ head.T).float(), labels)

    named = {
        "hypenet.losses.linear_cross_entropy": losses.linear_cross_entropy,
        "the same chunks in plain torch": plain,
        "full logits": full,
    }
    compare(alone, named, inputs, cross_entropy_reference)


def inputs_of(name: str, shape: Shape) -> tuple[Tensor, ...]:
    """The student's hidden states and head, which have gradients, then the teacher's or the labels."""
    hidden, head = shape.draw()
    hidden.requires_grad_(), head.requires_grad_()
    other = shape.draw() if name == "kl" else (torch.randint(0, shape.words, (shape.tokens,), device="cuda"),)
    return hidden, head, *other


def compare(
    alone: dict[str, Callable[[], Any]],
    named: dict[str, Loss],
    inputs: tuple[Tensor, ...],
    reference: Callable[..., tuple[Tensor, ...]],
) -> None:
    """A table of times, peaks and errors. Those of `alone` are parts of a loss, and have a time only."""
    expected = reference(*inputs)
    checked, runs = {}, dict(alone)
    for name, loss in named.items():
        run = partial(loss_and_gradients, loss, *inputs)
        try:
            value, *gradients = (relative(x, y) for x, y in zip(run(), expected, strict=True))
        except (RuntimeError, ImportError) as error:
            print(f"{name} does not run: {type(error).__name__}: {first_line(error)}")
            continue
        checked[name] = (peak_gib(run), value, max(gradients))
        runs[name] = run
    del expected
    times = milliseconds_in_turn(runs, repeats=12)
    rows = [(name, time, *checked.get(name, ("", "", ""))) for name, time in times.items()]
    print(table(["", "ms", "GiB", "loss, relative error", "gradients, relative error"], rows))


def kl_losses() -> dict[str, Loss]:
    def fla(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        loss = import_module("fla.modules.fused_kl_div").FusedKLDivLoss()
        return loss(hidden, teacher_hidden, head, teacher_head)

    def liger(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        loss = import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(jsd_beta=0.0)
        return loss(hidden, head, teacher_hidden, teacher_head, None)

    def full(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        student = (hidden @ head.T).float().log_softmax(-1)
        teacher = (teacher_hidden @ teacher_head.T).float().log_softmax(-1)
        return torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean")

    return {
        "halo.losses.linear_kl": our_kl,
        "fla FusedKLDivLoss": fla,
        "Liger FusedLinearJSD, beta 0": liger,
        "full logits": full,
    }


def our_kl(hidden: Tensor, head: Tensor, *teacher: Tensor) -> Tensor:
    labels = torch.arange(len(hidden), device=hidden.device)  # as stage 2 gives them, for the metrics
    return linear_kl(hidden, head, FactoredLogits(*teacher), labels=labels)[0]


def loss_and_gradients(loss: Loss, *inputs: Tensor) -> tuple[Tensor, ...]:
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs[:2])


@torch.no_grad()
def products(hidden: Tensor, head: Tensor, *teacher: Tensor) -> None:
    """Those that every exact loss needs, in bf16: all logits, and the gradients of hidden states and head."""
    for rows in torch.arange(len(hidden)).split(1024):
        chunk = slice(rows[0].item(), rows[-1].item() + 1)
        if teacher:
            teacher[0][chunk] @ teacher[1].T
        to_logits = hidden[chunk] @ head.T
        to_logits @ head
        to_logits.T @ hidden[chunk]


@torch.no_grad()
def kl_rows_alone(hidden: Tensor, head: Tensor, *_: Tensor) -> None:
    """All tokens' rows, on the same logits again and again: the parts that the loss makes at a time."""
    part, _ = losses.chunk_sizes(hidden, len(head), None, live=LIVE_NUMBERS)
    student, teacher = (hidden.new_zeros(part, len(head), dtype=torch.float32) for _ in range(2))
    to_logits, weights = hidden.new_empty(part, len(head)), student.new_ones(part)
    for begin in range(0, len(hidden), part):
        rows = min(part, len(hidden) - begin)
        terms = (None, None, Terms(1.0, 0.0))
        kl_rows_triton(student[:rows], teacher[:rows], weights[:rows], *terms, to_logits[:rows])


@torch.no_grad()
def cross_entropy_rows_alone(hidden: Tensor, head: Tensor, labels: Tensor) -> None:
    part, _ = losses.chunk_sizes(hidden, len(head), None, live=1)
    logits = hidden.new_zeros(part, len(head), dtype=torch.float32)
    to_logits, share = hidden.new_empty(part, len(head)), logits.new_ones(())
    for begin in range(0, len(hidden), part):
        rows = min(part, len(hidden) - begin)
        losses._rows_by_kernel(logits[:rows], labels[begin : begin + rows], share, to_logits[:rows])


def kl_reference(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients in float32 (and no tf32) from the same bf16 operands, 512 tokens at a time."""

    def rows(logits: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
        log_q, log_p = logits.log_softmax(-1), (teacher_hidden[tokens].float() @ teacher_head.float().T).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1), log_q.exp() - log_p.exp()

    return reference(hidden, head, rows)


def cross_entropy_reference(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    def rows(logits: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
        log_q, label = logits.log_softmax(-1), labels[tokens, None]
        to_logits = log_q.exp().scatter_add_(-1, label, -torch.ones_like(label, dtype=log_q.dtype))
        return -log_q.gather(-1, label), to_logits

    return reference(hidden, head, rows)


@torch.no_grad()
def reference(
    hidden: Tensor, head: Tensor, rows: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
) -> tuple[Tensor, ...]:
    """Loss and gradients from `rows`, which gives those of logits of some tokens."""
    torch.backends.cuda.matmul.allow_tf32 = False
    w = head.float()
    loss, to_hidden, to_head = torch.zeros((), device="cuda", dtype=torch.float64), [], torch.zeros_like(w)
    for begin in range(0, len(hidden), 512):
        tokens = slice(begin, begin + 512)
        h = hidden[tokens].float()
        summands, to_logits = rows(h @ w.T, tokens)
        loss += summands.sum(dtype=torch.float64)
        to_logits /= len(hidden)
        to_hidden.append(to_logits @ w)
        to_head += to_logits.T @ h
    return loss / len(hidden), torch.cat(to_hidden), to_head


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# The constants that cut the work


def sizes(name: str, shape: Shape, args: argparse.Namespace) -> None:
    """A row for each combination of constants, the best last."""
    inputs = inputs_of(name, shape)
    loss = our_kl if name == "kl" else losses.linear_cross_entropy
    live = LIVE_NUMBERS if name == "kl" else 1
    runs: dict[str, Callable[[], Any]] = {}
    cells: dict[str, tuple[Any, ...]] = {}
    for lanes, mib, gradient in product(args.lanes, args.mib, args.gradient):
        places = replacements(lanes, mib, gradient)
        with replaced(*places):
            part, whole = losses.chunk_sizes(inputs[0], shape.words, None, live=live)
        chunks = -(-shape.tokens // whole)
        how = "bf16" if chunks <= losses.FEW_CHUNKS else "float32"
        run = partial(with_constants, places, partial(loss_and_gradients, loss, *inputs))
        try:
            peak = peak_gib(run)
        except RuntimeError as error:
            print(f"{lanes}, {mib} MiB, {gradient}, {how} does not run: {first_line(error)}")
            continue
        row = (lanes, mib, gradient, how, part, chunks)
        runs[str(row)], cells[str(row)] = run, (*row, peak)
    times = milliseconds_in_turn(runs, repeats=8, warm_up=2)
    rows = [(*cells[row], times[row]) for row in sorted(times, key=times.__getitem__, reverse=True)]
    columns = ["MOST_LANES x WARPS", "CHUNK_BYTES, MiB", "GRADIENT", "sum of the head's", "part", "chunks", "GiB", "ms"]
    print(table(columns, rows))


Place = tuple[Any, str, Any]
"""A module, a name in it, and a value for it."""


def replacements(lanes: str, mib: int, gradient: int) -> list[Place]:
    most_lanes, warps = map(int, lanes.split("x"))
    return [
        (loss_kernels, "MOST_LANES", most_lanes),
        (loss_kernels, "WARPS", warps),
        (losses, "CHUNK_BYTES", mib * 2**20),
        (losses, "GRADIENT", gradient),
    ]


def with_constants(places: list[Place], run: Callable[[], Any]) -> Any:
    with replaced(*places):
        return run()


@contextmanager
def replaced(*places: Place) -> Iterator[None]:
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)


if __name__ == "__main__":
    main()
