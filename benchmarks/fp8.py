"""A teacher's products in FP8: how fast they are at the 1.7B's shapes, and how far they move its logits.

python -m benchmarks.fp8 [--tokens 6144] [--layers 8]

Errors are those of the KL divergence from the logits of float32, beside that of bf16, for two teachers: one of the
1.7B's shapes with random weights and tokens, and the embedded one on its own corpus.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.measure import as_graph, header, milliseconds_in_turn, table
from halo.models.loading import load_teacher
from halo.models.tokenizer import load_tokenizer
from halo.plan.shapes import PUBLISHED
from halo.preset import load_config
from halo.teacher.colocated import Teacher
from halo.teacher.fp8 import Fp8Linear, check_fp8, quantised, to_fp8

ROWS = 256
"""Tokens whose logits exist at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--layers", type=int, default=8, help="of the teacher with random weights (default: 8)")
    args = parser.parse_args()
    print(header())
    check_fp8(())
    torch.manual_seed(0)
    speed(args.tokens)
    print()
    errors({f"the 1.7B's shapes, {args.layers} layers, random": drawn(args.layers), "embedded": embedded()})


@torch.no_grad()
def speed(tokens: int) -> None:
    """A row for each product of a layer: ms on the GPU, as CUDA graphs."""
    rows: list[list[Any]] = []
    for name, outer, inner in (
        ("q and o", 2048, 2048),
        ("k and v", 1024, 2048),
        ("gate and up", 6144, 2048),
        ("down", 2048, 6144),
    ):
        linear = nn.Linear(inner, outer, bias=False, device="cuda", dtype=torch.bfloat16)
        layer, x = Fp8Linear(linear), torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16)
        operands = quantised(x)
        runs: dict[str, Callable[[], Any]] = {
            "bf16": lambda linear=linear, x=x: linear(x),
            "quantise": lambda x=x: quantised(x),
            "fp8": lambda layer=layer, operands=operands: layer.product(*operands),
        }
        times = milliseconds_in_turn({name: as_graph(run) for name, run in runs.items()})
        rows.append([f"{name}: {inner:,} to {outer:,}", *times.values(), times["bf16"] / times["fp8"]])
    print(f"Products of {tokens:,} tokens, ms\n")
    print(table(["", "bf16", "quantise the input", "FP8", "bf16 / FP8"], rows), flush=True)


Case = tuple[PreTrainedModel, Tensor]
"""A teacher in float32, and the tokens that it reads, [B, T]."""


def drawn(layers: int) -> Case:
    """Random weights, as transformers initialises them."""
    config = Qwen3Config(**PUBLISHED["Qwen/Qwen3-1.7B"] | {"num_hidden_layers": layers})
    with torch.device("cuda"):
        return Qwen3ForCausalLM(config), torch.randint(0, config.vocab_size, (4, 512))


def embedded() -> Case:
    """The trained teacher of the preset `tiny`, in rows of its training length."""
    config = load_config("tiny")
    teacher = Path(config.teacher)
    texts = sorted((teacher.parent / "corpus").glob("[a-z]*.txt"))
    ids = load_tokenizer(teacher)("\n".join(text.read_text()[:20_000] for text in texts))["input_ids"]
    rows = torch.tensor(ids[: 64 * 256], device="cuda").view(-1, 256)
    return load_teacher(teacher).float().cuda(), rows


@torch.no_grad()
def errors(cases: dict[str, Case]) -> None:
    rows = []
    for name, (model, tokens) in cases.items():
        half, fp8 = (copy.deepcopy(model).bfloat16() for _ in range(2))
        for layer in fp8.model.layers:
            to_fp8(layer)
        exact, *others = (Teacher(each).hidden_states(tokens).flatten(0, 1) for each in (model, half, fp8))
        head = model.lm_head.weight
        of_bf16, of_fp8 = (difference(exact, head, hidden, head.bfloat16()) for hidden in others)
        between = difference(others[0], head.bfloat16(), others[1], head.bfloat16())
        rows.append([name, tokens.numel(), *of_bf16, *of_fp8, *between])
    columns = [f"{what}, {pair}" for pair in ("bf16", "FP8", "FP8 to bf16") for what in ("KL", "same top-1")]
    print("KL of the logits to those of float32, nats, and how often the largest is the same word\n")
    print(table(["teacher", "tokens", *columns], rows), flush=True)


def difference(p_hidden: Tensor, p_head: Tensor, q_hidden: Tensor, q_head: Tensor) -> tuple[float, float]:
    """(KL(p | q), share of tokens with the same largest logit) of two teachers' hidden states [N, E], heads [V, E]."""
    kl, same = 0.0, 0
    for p, q in zip(p_hidden.split(ROWS), q_hidden.split(ROWS), strict=True):
        log_p, log_q = (
            (hidden.float() @ head.float().T).log_softmax(-1) for hidden, head in ((p, p_head), (q, q_head))
        )
        kl += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item()
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum().item())
    return kl / len(p_hidden), same / len(p_hidden)


if __name__ == "__main__":
    main()
