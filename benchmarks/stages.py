"""Speed and memory of the training stages at true shapes, random weights, random tokens, through the trainer's engine.

torchrun --nproc_per_node 2 -m benchmarks.stages --stage distill --teacher 8b --ds_config ds_configs/zero3.json
"""

import argparse
import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.measure import header
from halo.config import Distill, load_config
from halo.distributed import device, rank, world_size
from halo.engine import Engine, read_ds_config
from halo.look_ahead import LookAhead
from halo.objectives import Alignment, Distillation, NextToken
from halo.plan_load import PUBLISHED
from halo.stages.align import new_mixers
from halo.teacher import Teacher
from halo.trainer import Objective
from hypenet.transfer import hybrid_config, hybrid_from_teacher

TEACHERS = {"1.7b": "Qwen/Qwen3-1.7B", "4b": "Qwen/Qwen3-4B", "8b": "Qwen/Qwen3-8B"}
PRESETS = {"1.7b": "hypenet-2b", "4b": "hypenet-5b", "8b": "hypenet-9b"}
KEPT = {"1.7b": [3, 21, 2, 9, 25, 6, 8], "4b": [10, 6, 7, 24, 33, 2, 4, 1, 34], "8b": [10, 6, 7, 24, 33, 2, 4, 1, 34]}

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
ALONE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
"""The environment of one process that no launcher started."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["align", "distill", "finetune"], required=True)
    parser.add_argument("--teacher", choices=TEACHERS, required=True)
    parser.add_argument("--micro_batch", type=int, help="sequences a rank takes at once (default: the preset's)")
    parser.add_argument("--seq_len", type=int, help="(default: the preset's)")
    parser.add_argument("--ds_config", default="ds_configs/zero1.json")
    parser.add_argument("--teacher_sharded", action="store_true", help="cut the teacher over the ranks")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="print the kernels that take the most time")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        os.environ |= ALONE
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=device())

    training = settings(args)
    torch.manual_seed(rank())
    objective = build(args, training)
    state = weights(objective)
    external = objective.external_parameters()
    engine = Engine(
        objective, training, read_ds_config(Path(args.ds_config)), external, clip_apart=objective.clip_apart
    )
    torch.cuda.synchronize()
    ready = torch.cuda.memory_allocated() / 2**30
    seconds = run(objective, engine, training, args.steps)
    tokens = training.micro_batch * training.seq_len
    if rank() == 0:
        print(header())
        print(
            f"{args.stage} {args.teacher}, {tokens} tokens a GPU and step: {tokens / seconds:,.0f} tokens/s a GPU, "
            f"{1000 * seconds:.0f} ms a step, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB "
            f"({ready:.1f} before the first step, {state:.1f} of bf16 weights; "
            f"reserved {torch.cuda.max_memory_reserved() / 2**30:.1f})",
            flush=True,
        )
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(objective, engine, training, 1, warm_up=0)
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=80))
    engine.close()
    dist.destroy_process_group()


def settings(args: argparse.Namespace) -> Distill:
    preset = getattr(load_config(PRESETS[args.teacher]), args.stage)
    chosen = {"micro_batch": args.micro_batch, "seq_len": args.seq_len, "activation_checkpointing": args.checkpointing}
    values = vars(preset) | {name: value for name, value in chosen.items() if value is not None}
    known = {name: value for name, value in values.items() if name in Distill.__dataclass_fields__}
    known |= {"batch": known["micro_batch"] * world_size()}
    return Distill(**known | {"teacher_sharded": args.teacher_sharded})


def build(args: argparse.Namespace, training: Distill) -> Objective:
    """The stage's objective on this GPU, in bf16."""
    config = Qwen3Config(**PUBLISHED[TEACHERS[args.teacher]], rope_theta=1e6, attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device()):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if args.stage == "align":
        mixers = new_mixers(model, "lightning-attn")
        return Alignment(mixers, Teacher(model))
    hybrid = hybrid_config(config, attention_layers=KEPT[args.teacher])
    student = hybrid_from_teacher(model, hybrid).train()
    checkpointing = {"activation_checkpointing": training.activation_checkpointing}
    if args.stage == "distill":
        return Distillation(student, Teacher(model, sharded=args.teacher_sharded), **checkpointing)
    return NextToken(student, **checkpointing)


def weights(objective: Objective) -> float:
    """GiB of the trained weights in bf16."""
    return sum(p.numel() * 2 for p in objective.parameters()) / 2**30


class RandomTokens:
    """In the place of a TokenStream."""

    def __init__(self, micro_batch: int, seq_len: int):
        self._shape = (micro_batch, seq_len)

    def __next__(self) -> torch.Tensor:
        return torch.randint(0, 151_936, self._shape)

    def state_dict(self) -> dict[str, Any]:
        return {}


class Untimed:
    """In the place of Metrics."""

    def waiting(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()


def run(objective: Objective, engine: Engine, training: Distill, steps: int, warm_up: int = 3) -> float:
    """Seconds a step, over `steps` after some to warm up."""
    ahead = LookAhead(RandomTokens(training.micro_batch, training.seq_len), objective.ask)
    for step in range(steps + warm_up):
        if step == warm_up:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
        engine.accumulate(**ahead.take(Untimed()))
        ahead.ask(Untimed())
        engine.step(1e-5)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    main()
