"""The fused KL of stage 2 against other implementations: loss and both gradients at Qwen3's vocabulary.

python -m benchmarks.kl [--tokens 6144] [--words 151936] [--width 2048]
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from benchmarks.measure import header, milliseconds_in_turn, peak_gib, table
from halo.errors import first_line
from halo.losses.linear_kl import linear_kl
from halo.teacher.logits import FactoredLogits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--words", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=2048)
    args = parser.parse_args()
    print(header())

    torch.manual_seed(0)
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    spread = args.width**-0.5 * 2.5  # logits of about Qwen3's size
    hidden, teacher_hidden = draw(args.tokens, args.width), draw(args.tokens, args.width)
    head, teacher_head = draw(args.words, args.width) * spread, draw(args.words, args.width) * spread
    hidden.requires_grad_(), head.requires_grad_()
    inputs = (hidden, head, teacher_hidden, teacher_head)

    expected = reference(*inputs)
    checked, runs = {}, {"the four matrix products alone": partial(products, *inputs)}
    for name, loss in losses().items():
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


def losses() -> dict[str, Callable[..., Tensor]]:
    """The losses to compare, by name: (hidden, head, teacher_hidden, teacher_head) -> KL, mean over tokens."""

    def ours(hidden: Tensor, head: Tensor, *teacher: Tensor) -> Tensor:
        labels = torch.arange(len(hidden), device=hidden.device)  # as stage 2 gives them, for the metrics
        return linear_kl(hidden, head, FactoredLogits(*teacher), labels=labels)[0]

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
        "halo.losses.linear_kl": ours,
        "fla FusedKLDivLoss": fla,
        "Liger FusedLinearJSD, beta 0": liger,
        "full logits": full,
    }


def loss_and_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs[:2])


def products(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> None:
    """The products that every exact loss needs: both logits, and the gradients of hidden states and head. In bf16."""
    with torch.no_grad():
        for h, w in zip(hidden.split(1024), teacher_hidden.split(1024), strict=True):
            w @ teacher_head.T
            d = h @ head.T
            d @ head
            d.T @ h


def reference(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients in float32 (and no tf32) from the same bf16 operands, 512 tokens at a time."""
    torch.backends.cuda.matmul.allow_tf32 = False
    w, w_t = head.detach().float(), teacher_head.float()
    loss, to_hidden, to_head = torch.zeros((), device="cuda", dtype=torch.float64), [], torch.zeros_like(w)
    for h, h_t in zip(hidden.detach().float().split(512), teacher_hidden.float().split(512), strict=True):
        log_q, log_p = (h @ w.T).log_softmax(-1), (h_t @ w_t.T).log_softmax(-1)
        loss += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)
        d = (log_q.exp() - log_p.exp()) / len(hidden)
        to_hidden.append(d @ w)
        to_head += d.T @ h
    return loss / len(hidden), torch.cat(to_hidden), to_head


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


if __name__ == "__main__":
    main()
