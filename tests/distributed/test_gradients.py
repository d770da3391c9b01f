"""Norms by layer and clipping, under each ZeRO, against plain torch in one process."""

import json
from pathlib import Path

import pytest
import torch

from halo.data.stream import TokenStream
from halo.stages.align import new_mixers
from halo.teacher.colocated import Teacher
from halo.training.gradients import by_layer
from halo.training.objectives import Alignment, Distillation
from halo.training.trainer import Objective, learning_rate
from tests.distributed import jobs
from tests.distributed.ranks import run_ranks

CLIP = {"align": 0.6, "distill": 0.5}
"""Less than some layers' norms, and more than others'."""


def objective_of(stage: str, settings: jobs.Distill, folder: Path) -> Objective:
    teacher = jobs.make_teacher()
    if stage == "distill":
        return Distillation(jobs.student_of(jobs.files(folder), "zero1.json", settings), Teacher(teacher))
    torch.manual_seed(1)
    return Alignment(new_mixers(teacher, "lightning-attn"), Teacher(teacher))


def plain(
    stage: str, settings: jobs.Distill, shards: Path, folder: Path
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The norms of each step before clipping, and AdamW's first moments in the end."""
    objective = objective_of(stage, settings, folder).train()
    layers = by_layer(objective)
    optimizer = torch.optim.AdamW(objective.parameters(), betas=settings.betas, weight_decay=settings.weight_decay)
    stream = TokenStream(shards, micro_batch=settings.batch, seed=settings.seed, rank=0, world_size=1)
    norms = []
    for step in range(settings.steps):
        input_ids = next(stream)
        optimizer.zero_grad()
        objective(jobs.batch_of(objective, input_ids))[0].backward()
        norm = {name: torch.nn.utils.get_total_norm([p.grad for p in layer]) for name, layer in layers.items()}
        total = torch.linalg.vector_norm(torch.stack(list(norm.values())))
        norms.append({f"gradient_norm/{name}": float(n) for name, n in norm.items()} | {"gradient_norm": float(total)})
        for group in layers.values() if objective.clip_apart else [list(objective.parameters())]:
            torch.nn.utils.clip_grad_norm_(group, settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
    return norms, {name: optimizer.state[p]["exp_avg"] for name, p in objective.named_parameters()}


@pytest.mark.parametrize(
    ("zero", "fused"),
    [
        ("zero1.json", False),
        ("zero2.json", False),
        ("zero3.json", False),
        ("zero3_offload.json", False),
        ("zero1.json", True),
        ("zero2.json", True),
    ],
)
@pytest.mark.parametrize("stage", ["align", "distill"])
def test_clipping_is_that_of_plain_torch(tmp_path, shards, stage, zero, fused):
    settings = jobs.training(micro_batch=2, clip=CLIP[stage])  # two ranks, two micro-batches each
    norms, moments = plain(stage, settings, shards, tmp_path / "run")
    of_layers = [norm for step in norms for name, norm in step.items() if "/" in name]
    assert min(of_layers) < settings.clip < max(of_layers)
    job = (jobs.first_moments, getattr(jobs, stage), shards, tmp_path / "run", zero, settings)
    found = run_ranks(2, *([jobs.with_fused_step] if fused else []), *job)[0].weights
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for expected, line in zip(norms, lines, strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert found.keys() == moments.keys()
    for name, moment in moments.items():
        assert (found[name] - moment).norm() < 1e-3 * moment.norm(), name
