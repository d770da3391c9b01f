"""Functions that the tests of gathering run on each rank: importable, with picklable arguments."""

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from halo.data.stream import TokenStream
from halo.distributed import device
from halo.models.build import build_hybrid, build_mixers, build_teacher
from halo.models.loading import load_model_config
from halo.teacher.colocated import Teacher, teacher_group
from halo.training.engine import Engine, layers_of, placement, read_ds_config
from halo.training.objectives import Alignment, NextToken
from hypenet.transfer import hybrid_config
from tests.distributed import jobs

WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
SHAPE = WIDE if torch.cuda.is_available() else {}
"""On a GPU, heads that its kernels compute."""
STEPS = 4
PERSISTENT = 200
"""The largest parameter that is not partitioned: a norm, as in a model of real size."""


def read_zero(**changes: Any) -> dict[str, Any]:
    """zero3.json, but all matrices of a small model are partitioned too."""
    config = read_ds_config(jobs.DS_CONFIGS / "zero3.json")
    changes |= {"stage3_param_persistence_threshold": PERSISTENT}
    return config | {"zero_optimization": config["zero_optimization"] | changes}


class Watched(Engine):
    """Records what DeepSpeed's coordinator finds when it fetches a layer, or a stage 1 regression."""

    def __init__(self, module: nn.Module, *args: Any, **options: Any):
        super().__init__(module, *args, **options)
        self.watched = layers_of(module) or list(module.regressions.values())
        self.exposed: list[list[int]] = []
        self.live: list[int] = []
        coordinator = self._engine.optimizer.parameter_offload.get_param_coordinator()
        plain = coordinator.fetch_sub_module

        def fetch_sub_module(module: nn.Module, forward: bool) -> None:
            if module in self.watched:
                needed = [*module.parameters(), *(p for _, p in module.ds_external_parameters())]
                self.exposed[-1].append(sum(p.ds_numel for p in needed if p.ds_status == ZeroParamStatus.NOT_AVAILABLE))
            plain(module, forward)
            whole = [p for p in self.module.parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
            self.live[-1] = max(self.live[-1], sum(p.ds_numel for p in whole))

        coordinator.fetch_sub_module = fetch_sub_module

    def train(self, shards: Path, settings: jobs.Distill) -> list[float]:
        """The losses of a few steps. Each is one micro-batch."""
        stream, losses = TokenStream(shards, micro_batch=4, seed=0, rank=0, world_size=1), []
        for _ in range(STEPS):
            self.exposed.append([])
            self.live.append(0)
            loss, _ = self.accumulate(jobs.batch_of(self.module, next(stream)).to(device()))
            self.step(1e-3)
            losses.append(loss.item())
        return losses


def gathered(shards: Path, folder: Path, checkpointing: bool, changes: dict[str, Any]) -> dict[str, Any]:
    """What stage 3 gathers: losses; for each step, the elements that layers waited for, and the most that are whole."""
    settings, config = jobs.training(batch=4 * 2), read_zero(**changes)
    made = jobs.files(folder, **{"tie_word_embeddings": False} | SHAPE)
    student = build_hybrid(made / "hybrid", placement(config, settings))
    objective = NextToken(student, activation_checkpointing=checkpointing)
    built = Watched(objective.train(), settings, config, objective.external_parameters())
    losses = built.train(shards, settings)
    sizes = [[p.ds_numel for p in layer.parameters()] for layer in built.watched]
    return {
        "losses": losses,
        "exposed": built.exposed,
        "live": built.live,
        "largest": max(map(max, sizes)),
        "layers": [sum(of_layer) for of_layer in sizes],
        "partitioned": [sum(size for size in of_layer if size > PERSISTENT) for of_layer in sizes],
        "head": student.lm_head.weight.ds_numel,
    }


def regressions_gathered(shards: Path, folder: Path) -> dict[str, Any]:
    """The same of stage 1."""
    settings, config = jobs.training(batch=4 * 2), read_zero()
    teacher = jobs.files(folder) / "teacher"
    mixers = build_mixers(teacher, hybrid_config(load_model_config(teacher), []), placement(config, settings))
    objective = Alignment(mixers, Teacher(build_teacher(teacher)))
    built = Watched(objective.train(), settings, config, objective.external_parameters(), clip_apart=True)
    return {"losses": built.train(shards, settings), "exposed": built.exposed, "layers": len(mixers)}


def teacher_gathered(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """A whole teacher's and a cut one's hidden states, of two inputs; what the cut one had gathered in each layer."""
    path = jobs.files(folder, **changes | SHAPE) / "teacher"
    whole, cut = Teacher(build_teacher(path)), Teacher(build_teacher(path, teacher_group(sharded=True)))
    seen: list[tuple[bool, int]] = []
    groups = [layer._get_fsdp_state()._fsdp_param_group for layer in cut.layers]

    def watch(i: int) -> None:
        def hook(*_: Any) -> None:
            following = groups[(i + 1) % len(groups)]
            seen.append((following._all_gather_result is not None, sum(not group.is_sharded for group in groups)))

        cut.layers[i].mlp.register_forward_pre_hook(hook)

    for i in range(len(groups)):
        watch(i)
    pairs = []
    for length in (16, 24):
        input_ids = torch.arange(2 * length).view(2, length) % jobs.SHAPE["vocab_size"]
        input_ids = input_ids.to(device())
        pairs.append((whole.hidden_states(input_ids).cpu(), cut.hidden_states(input_ids).cpu()))
    return {"pairs": pairs, "seen": seen, "contexts": len({id(group.comm_ctx) for group in groups})}
