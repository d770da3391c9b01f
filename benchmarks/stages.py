"""Speed and memory of the training stages at real shapes: the trainer itself, with random weights and tokens.

    python -m benchmarks.stages --stage distill --teacher 1.7b --no-checkpointing
    torchrun --nproc_per_node 2 -m benchmarks.stages --stage distill --teacher 8b --ds_config ds_configs/zero3.json \
        --placement dedicated --teacher_ranks 1

Models are built as in a stage (halo/models/build.py), but their weights are random numbers, not those of a checkpoint's
files. No checkpoint is written. It prints the medians of metrics.jsonl, over the steps after the warm-up but the last.
"""

import argparse
import copy
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from benchmarks.measure import header, table
from halo.config import Distill
from halo.data.shards import write_shards
from halo.distributed import device, on_rank0, rank, world_size
from halo.models import build
from halo.models.attention import IMPLEMENTATIONS, check_attention, choose, shape_of
from halo.models.attention_functions import registered, use_attention
from halo.plan.shapes import PUBLISHED
from halo.preset import load_config
from halo.ranks import RankLayout, split_ranks
from halo.run import StageFolder
from halo.stages.distill import logits_form, options_of, teacher_of
from halo.teacher.colocated import Teacher, TeacherSource
from halo.teacher.dedicated import serve
from halo.teacher.fp8 import check_fp8
from halo.training import trainer
from halo.training.engine import Engine, placement, read_ds_config, split_batch, whole_size
from halo.training.objectives import Alignment, Distillation, NextToken
from halo.training.trainer import Objective, train
from halo.training.tuning import tune_once
from hypenet.transfer import empty_hybrid, hybrid_config

TEACHERS: dict[str, PretrainedConfig] = {
    size: Qwen3Config(**PUBLISHED[f"Qwen/Qwen3-{size.upper()}"], rope_theta=1e6, architectures=["Qwen3ForCausalLM"])
    for size in ("1.7b", "4b", "8b")
}
TEACHERS["135m"] = LlamaConfig(  # SmolLM2-135M
    vocab_size=49_152,
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    rope_theta=1e5,
    tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"],
)
PRESETS = {"135m": "hypenet-2b", "1.7b": "hypenet-2b", "4b": "hypenet-5b", "8b": "hypenet-9b"}
KEPT = {  # Table 7; SmolLM2 is not in it
    "135m": [2, 6, 10, 14, 18, 22, 26],
    "1.7b": [3, 21, 2, 9, 25, 6, 8],
    "4b": [0, 7, 1, 33, 24, 15, 34, 22, 14],
    "8b": [10, 6, 7, 24, 33, 2, 4, 1, 34],
}
MIXERS = "mixers.safetensors"

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
ALONE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
"""The environment of one process that no launcher started."""


def main() -> None:
    args = _parser().parse_args()
    if args.steps <= args.warm_up:
        sys.exit(f"--steps must be more than the {args.warm_up} that warm up, not {args.steps}")
    if "RANK" not in os.environ:
        os.environ.update(ALONE | {"MASTER_PORT": os.environ.get("MASTER_PORT", ALONE["MASTER_PORT"])})
    store, number, size = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=5))))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(size))
    preset = load_config(PRESETS[args.teacher])
    split = split_ranks(
        store, number, size, preset_settings(args, preset.distill, 1) if args.stage == "distill" else None
    )
    if args.teacher_fp8:
        if args.stage != "distill":
            sys.exit("--teacher_fp8 is of stage distill")
        check_fp8(())
    args.attention = attention_of(args, getattr(preset, args.stage))
    if args.emulate:
        emulate(args.emulate)
    else:
        split.join()
    tune_once()
    folder = Path(args.folder or tempfile.gettempdir()) / f"benchmark-{os.environ['MASTER_PORT']}"
    teacher = write_teacher(args, folder)
    if split.is_teacher:
        serve(split)
    else:
        measure(args, preset_settings(args, getattr(preset, args.stage), world_size()), teacher, split)
        split.dismiss(0)
    dist.destroy_process_group()
    if split.is_teacher:
        split.leave()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["align", "distill", "finetune"], required=True)
    parser.add_argument("--teacher", choices=TEACHERS, required=True)
    parser.add_argument("--mixer", default="lightning-attn", help="of the RNN layers (default: lightning-attn)")
    parser.add_argument("--layers", type=int, help="use the teacher's first LAYERS layers (default: all)")
    parser.add_argument("--micro_batch", type=int, help="sequences of a rank's micro-batch (default: the preset's)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches a step (default: 1)")
    parser.add_argument("--seq_len", type=int, help="(default: the preset's)")
    parser.add_argument("--ds_config", default="ds_configs/zero1.json")
    parser.add_argument("--placement", default="colocated", choices=["colocated", "dedicated"])
    parser.add_argument("--teacher_ranks", type=int, default=0, help="of each node, with --placement dedicated")
    parser.add_argument("--teacher_sharded", action="store_true", help="cut the teacher over the ranks that hold it")
    parser.add_argument("--teacher_fp8", action="store_true", help="multiply in FP8 in the teacher's layers")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--kept_layers", type=int, default=-1, help="that keep all activations (default: all that fit)")
    parser.add_argument("--offload", action="store_true", help="keep checkpointed activations in host memory")
    parser.add_argument("--sequence_parallel", type=int, default=1, help="ranks that share a sequence (default: 1)")
    parser.add_argument("--attention", choices=["auto", *IMPLEMENTATIONS], default="auto", help="(default: auto)")
    parser.add_argument("--emulate", type=int, help="be the first of this many ranks, without the others")
    parser.add_argument("--steps", type=int, default=12, help="including the warm-up (default: 12)")
    parser.add_argument("--warm_up", type=int, default=4, help="first steps that are not counted (default: 4)")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step that take the most time")
    parser.add_argument("--folder", help="for the data and the metrics (default: the system's temporary folder)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def preset_settings(args: argparse.Namespace, preset: Any, ranks: int) -> Distill:
    """The preset's settings, changed by the command line. Stage 2 has all settings of stages 1 and 3."""
    chosen = {"micro_batch": args.micro_batch, "seq_len": args.seq_len, "activation_checkpointing": args.checkpointing}
    chosen |= {"sequence_parallel": args.sequence_parallel, "activation_offload": args.offload}
    chosen |= {"kept_layers": args.kept_layers, "teacher_fp8": args.teacher_fp8}
    chosen |= {"teacher_placement": args.placement, "teacher_ranks": args.teacher_ranks, "steps": args.steps}
    values = vars(preset) | {name: value for name, value in chosen.items() if value is not None}
    values = {name: value for name, value in values.items() if name in Distill.__dataclass_fields__}
    groups = max(1, ranks // args.sequence_parallel)
    values |= {"batch": values["micro_batch"] * args.accumulation * groups, "teacher_sharded": args.teacher_sharded}
    return Distill(**values | {"save_every": 10**9, "keep_every": 0})


def attention_of(args: argparse.Namespace, preset: Any) -> str:
    """What computes softmax attention, of teacher and student."""
    packed = getattr(preset, "mask_documents", False)
    shape = shape_of(TEACHERS[args.teacher], args.seq_len or preset.seq_len, packed, trains=args.stage != "align")
    check_attention(args.attention, shape)
    return choose(shape) if args.attention == "auto" else args.attention


def emulate(size: int) -> None:
    """Make this process the first of many ranks, without the others: it receives a copy of what it sends.

    So its memory is that of a real run, and its time that without communication.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def exchange(output: Tensor, given: Tensor, **_: Any) -> None:
        output.copy_(given)

    os.environ |= {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    trainer.waits_of_at_most = lambda limit: nullcontext()  # nothing is waited for
    dist.all_to_all_single = exchange  # the backend's own does not write its output


class Drawn(Mapping[str, Tensor]):
    """Random weights by name, drawn as they are read."""

    def __init__(self, shapes: Mapping[str, torch.Size]):
        self._shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        scale = 1.0 if "norm" in name else 0.02
        generator = torch.Generator(device()).manual_seed(crc32(name.encode()))  # the same in every run
        drawn = torch.randn(shape, device=device(), dtype=torch.bfloat16, generator=generator)
        return drawn * scale + float("norm" in name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write_teacher(args: argparse.Namespace, folder: Path) -> Path:
    """A teacher's folder without weights: random ones are drawn when they are read."""
    config = copy.deepcopy(TEACHERS[args.teacher])
    if args.layers:
        config.num_hidden_layers = args.layers
        if hasattr(config, "layer_types"):
            config.layer_types = config.layer_types[: args.layers]
    on_rank0(lambda: config.save_pretrained(folder / "teacher"))
    model = build.empty_teacher(folder / "teacher")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    every = hybrid_config(config, attention_layers=[], rnn_mixer=args.mixer)
    layers = empty_hybrid(every, dtype=torch.bfloat16, device=device()).model.layers
    mixers = {
        f"{i}.{name}": p.shape for i, layer in enumerate(layers) for name, p in layer.self_attn.named_parameters()
    }
    build.SafeTensors = lambda files: Drawn(mixers if files[0].name == MIXERS else shapes)  # type: ignore
    return folder / "teacher"


def measure(args: argparse.Namespace, training: Distill, teacher: Path, split: RankLayout) -> None:
    """Train for some steps, and print their time and memory."""
    ds_config, words = read_ds_config(args.ds_config), TEACHERS[args.teacher].vocab_size
    stage = StageFolder(teacher.parent / args.stage, {})
    shards = teacher.parent / f"shards-{training.batch}-{training.seq_len}"

    def prepare() -> None:
        (stage.path / "metrics.jsonl").unlink(missing_ok=True)
        if not shards.exists():
            samples = min(512, training.batch * (training.steps + 2))
            tokens = np.random.default_rng(0).integers(0, words, (samples, training.seq_len), dtype=np.uint32)
            write_shards(shards, tokens, {"tokenizer": "none"})

    on_rank0(prepare)
    nothing = {"resume": lambda engine: None, "is_written": lambda: False, "save": lambda *_: None}
    nothing |= {"publish": lambda: None}
    trainer.Checkpoints = lambda *_: SimpleNamespace(**nothing)  # type: ignore
    Engine.parameters_on_rank0 = lambda engine: {}  # type: ignore
    form = logits_form(training, words)
    shapes = nullcontext(SimpleNamespace(model=build.empty_teacher(teacher)))
    source: Any
    with shapes if args.stage == "finetune" else teacher_of(training, teacher, split, form, args.attention) as source:
        objective = objective_of(args, training, teacher, source, ds_config)
        trained = sum(whole_size(p) for p in objective.parameters() if p.requires_grad)
        held = (*source.model.parameters(), *source.model.buffers())  # in FP8, weights are buffers
        frozen = sum(x.nbytes for x in held if not x.is_meta)
        if args.profile:
            training = Distill(**vars(training) | {"profile_from": args.steps - 2, "profile_steps": 1})
        train(objective, training, shards=shards, folder=stage, ds_config=ds_config)
    if rank() == 0:
        lines = [json.loads(line) for line in (stage.path / "metrics.jsonl").read_text().splitlines()]
        counted = lines[args.warm_up : -2 if args.profile else -1] or lines[-1:]
        report(args, training, counted, trained, frozen, ds_config, first=lines[0]["step_s"])
        if args.profile:
            (trace,) = (stage.path / "tensorboard").glob("*.trace.json.gz")
            print(f"\n{kernels_of(trace)}\ntrace: {trace}", flush=True)


def kernels_of(trace: Path) -> str:
    """A table of the kernels of a profiler's trace: those that took the most time, and how long the GPU was busy."""
    with gzip.open(trace, "rt") as lines:
        kernels = [event for event in json.load(lines)["traceEvents"] if event.get("cat") == "kernel"]
    of: dict[str, list[float]] = {}
    for kernel in kernels:
        of.setdefault(kernel["name"][:90], []).append(kernel["dur"] / 1000)
    busy, until = 0.0, 0.0
    for begin, end in sorted((kernel["ts"], kernel["ts"] + kernel["dur"]) for kernel in kernels):
        busy, until = busy + max(0.0, end - max(begin, until)), max(until, end)
    rows = [[name, len(times), sum(times)] for name, times in sorted(of.items(), key=lambda item: -sum(item[1]))]
    return f"{table(['kernel', 'launches', 'ms'], rows[:40])}\nof {len(kernels)} launches; busy {busy / 1000:.1f} ms"


def objective_of(
    args: argparse.Namespace, training: Distill, teacher: Path, source: TeacherSource, ds_config: dict[str, Any]
) -> Objective:
    config, place = source.model.config, placement(ds_config, training)
    torch.manual_seed(training.seed)  # as stages do: new weights (the gates) are the same in every run
    if args.stage == "align":
        assert isinstance(source, Teacher)
        every = hybrid_config(config, [], rnn_mixer=args.mixer)
        every._attn_implementation = registered(args.attention)
        return Alignment(build.build_mixers(teacher, every, place), source)
    kept = [layer for layer in KEPT[args.teacher] if layer < config.num_hidden_layers]
    hybrid = hybrid_config(config, kept, rnn_mixer=args.mixer)
    student = build.build_student(teacher, hybrid, teacher / MIXERS, place)
    use_attention(student, args.attention)
    if args.stage == "distill":
        return Distillation(student, source, **options_of(training))
    return NextToken(student, **options_of(training))


def report(
    args: argparse.Namespace,
    training: Distill,
    lines: list[dict[str, float]],
    trained: int,
    frozen: int,
    ds_config: dict[str, Any],
    *,
    first: float,
) -> None:
    """Print medians over the steps but the last, which prefetches nothing, and the memory beyond that of the state.

    Args:
        frozen: bytes of the teacher.
        first: seconds of the first step, which compiles.
    """
    of = {name: median(line[name] for line in lines) for name in lines[0] if lines[0][name] is not None}
    stage = ds_config["zero_optimization"]["stage"]
    whole = {1: 2 + 14 / world_size(), 2: 2 + 14 / world_size(), 3: 16 / world_size()}[stage]
    explained = (trained * whole + frozen) / 2**30
    micro_batch, accumulation = split_batch(training)
    print(header())
    print(
        f"{args.stage} {args.teacher}, {args.mixer}, {trained / 1e9:.2f}B trained, {world_size()} "
        f"{'emulated ' if args.emulate else ''}ranks, {training.sequence_parallel} a sequence, of {accumulation} x "
        f"{micro_batch} x {training.seq_len} tokens, ZeRO-{stage}, {'offload, ' if training.activation_offload else ''}"
        f"{'teacher in FP8, ' if training.teacher_fp8 else ''}"
        f"checkpointing {'on' if training.activation_checkpointing else 'off'}, attention by {args.attention}: "
        f"{of['tokens_per_s_gpu']:,.0f} tokens/s a GPU, {1000 * of['step_s']:.0f} ms a step (the first {first:.1f} s), "
        f"MFU {of.get('mfu', 0):.1%} of the data sheet's peak, "
        f"waiting {of.get('teacher_wait_s', 0) / of['step_s']:.1%} for the teacher, "
        f"{of.get('data_wait_s', 0) / of['step_s']:.1%} for data, peak {of['peak_gib']:.1f} GiB, "
        f"{of['peak_gib'] - explained:.1f} of it beyond weights, gradients, optimizer and teacher "
        f"(reserved {of['reserved_gib']:.1f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
