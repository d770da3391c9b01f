"""The mixers' speed: Lightning on our kernels and on fla's, then every mixer's layer by length (Figure 7).

python -m benchmarks.mixers [--heads 32] [--head_dim 128] [--lengths 4096 16384 65536] [--mixers lightning-attn gdn ...]
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import as_graph, header, milliseconds, milliseconds_in_turn, table
from halo.errors import first_line
from hypenet import HypeNetConfig
from hypenet.fixed_decay import fixed_decay_attention
from hypenet.kernels import kernel
from hypenet.mixer_lightning import lightning_log_decay
from hypenet.mixers import MIXERS, build_mixer
from hypenet.modeling_hypenet import HypeNetRotaryEmbedding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16_384, 65_536])
    parser.add_argument("--mixers", nargs="+", default=sorted(MIXERS))
    args = parser.parse_args()
    print(header())
    print("Lightning Attention in bf16, ms on the GPU (a CUDA graph's replay)\n")
    shapes = [(1, 16_384, args.heads, args.head_dim), (1, 131_072, 16, 128), (12, 512, 16, 128), (96, 512, 9, 64)]
    columns = ["", "forward", "fla's", "and backward", "fla's", "fla's / ours"]
    print(table(columns, [lightning(*shape) for shape in shapes]), flush=True)
    layers(args.mixers, args.heads, args.head_dim, args.lengths)


def lightning(batch: int, length: int, heads: int, dim: int) -> list[Any]:
    """A row of the table: forward, then forward and backward, on [batch, length, heads, dim] in bf16."""
    torch.manual_seed(0)
    draw = partial(torch.randn, batch, length, heads, dim, device="cuda", dtype=torch.bfloat16)
    q, k, v, grad = draw(requires_grad=True), draw(requires_grad=True), draw(requires_grad=True), draw()
    decay, scale = lightning_log_decay(heads, q.device), dim**-0.5
    fla = kernel("simple_gla.chunk_simple_gla", state=dim * dim)
    operations: dict[str, Callable[[], Tensor]] = {
        "hypenet": lambda: fixed_decay_attention(q, k, v, decay, scale=scale)[0],
        "fla": lambda: fla(q, k, v, g_gamma=decay, scale=scale)[0],
    }

    def both(name: str) -> None:
        torch.autograd.grad(operations[name](), (q, k, v), grad)

    forward = milliseconds_in_turn({name: as_graph(run) for name, run in operations.items()})
    trained = milliseconds_in_turn({name: as_graph(partial(both, name)) for name in operations})
    shape = f"{batch} x {length:,}, {heads} heads of {dim}"
    return [shape, *forward.values(), *trained.values(), trained["fla"] / trained["hypenet"]]


def layers(names: list[str], heads: int, dim: int, lengths: list[int]) -> None:
    """One layer of each mixer in bf16, batch 1: forward alone, and forward with backward."""
    print(
        f"One layer, hidden size {heads * dim}, {heads} heads of {dim}, batch 1: forward / forward and backward, ms\n"
    )
    print(table(["", *(f"{length:,}" for length in lengths)], []), flush=True)
    for name in names:
        cells: list[Any] = [name]
        for length in lengths:
            try:
                cells.append(" / ".join(f"{t:.2f}" for t in layer(name, heads, dim, length)))
            except (RuntimeError, ImportError) as error:
                cells.append(first_line(error)[:60])
        print(table([], [cells]).splitlines()[-1], flush=True)


def layer(name: str, heads: int, dim: int, length: int) -> tuple[float, float]:
    """(forward, forward and backward) of one layer, in milliseconds."""
    config = HypeNetConfig(
        hidden_size=heads * dim,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        head_dim=dim,
        num_hidden_layers=1,
        mixer_types=[name],
        attn_implementation="sdpa",
    )
    with torch.device("cuda"):
        mixer = build_mixer(config, 0).bfloat16().train()
        positions = torch.arange(length)[None]
        x = torch.randn(1, length, heads * dim, dtype=torch.bfloat16, requires_grad=True)
        rotary = HypeNetRotaryEmbedding(config)(x, positions)
        grad = torch.randn_like(x)

    def forward() -> Tensor:
        return mixer(hidden_states=x, position_embeddings=rotary, position_ids=positions)[0]

    def both() -> None:
        forward().backward(grad)
        mixer.zero_grad(set_to_none=True)

    with torch.no_grad():
        alone = milliseconds(forward, repeats=10)
    return alone, milliseconds(both, repeats=10)


if __name__ == "__main__":
    main()
