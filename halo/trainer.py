"""The one training loop. A stage is an objective (a model and a loss); this runs it.

objective.teach(input_ids)     what the frozen teacher says of a micro-batch, outside the engine
objective(input_ids, ...)      the loss, inside the engine
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halo.checkpoint import Checkpoints
from halo.config import Training
from halo.distributed import device, rank, world_size
from halo.engine import Engine, split_batch
from halo.errors import UserError
from halo.metrics import Metrics, mean_over_ranks
from halo.run import StageFolder
from halo.stream import TokenStream


class Objective(nn.Module):
    """What a stage trains. Its parameters are the trained ones; a frozen teacher must not be registered on it."""

    def teach(self, input_ids: Tensor) -> dict[str, Any]:
        """What the loss needs from the teacher for [B, T] tokens, without gradient. Becomes forward's keywords."""
        return {}

    def forward(self, input_ids: Tensor, **taught: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, T] tokens -> the mean loss (a scalar), and scalars to log."""
        raise NotImplementedError

    def external_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """(module, parameter) pairs where the module's forward reads a parameter that a child owns."""
        return []


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a stage's training cost, and its outcome."""

    weights: dict[str, Tensor]
    """The trained parameters, whole, on rank 0 (empty elsewhere)."""
    tokens: int
    parameters: int
    seconds: float
    loss: float

    def summary(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "parameters": self.parameters,
            "seconds": round(self.seconds, 1),
            "loss": self.loss,
        }


def learning_rate(training: Training, step: int) -> float:
    """The LR of 0-based `step`: linear warm-up from 0, then the schedule (Appendix B, Table 12)."""
    t = training
    if step < t.warmup:
        return t.lr * (step + 1) / t.warmup
    if t.schedule == "constant":
        return t.lr
    if t.schedule == "cosine":
        progress = (step - t.warmup) / max(1, t.steps - t.warmup)
        return t.min_lr + (t.lr - t.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    left = t.steps - step
    return t.lr if left > t.decay else t.min_lr + (t.lr - t.min_lr) * left / t.decay


def train(
    objective: Objective, training: Training, *, shards: Path, folder: StageFolder, ds_config: dict[str, Any]
) -> Result:
    """Train `objective` on the samples in `shards`, from the last checkpoint in `folder` or from the start.

    Raises:
        UserError: settings that do not fit the ranks or the data, an unreadable checkpoint, a loss that is not finite.
    """
    micro_batch, accumulation = split_batch(training)
    stream = TokenStream(shards, micro_batch=micro_batch, seed=training.seed, rank=rank(), world_size=world_size())
    torch.manual_seed(training.seed)
    parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    engine = Engine(objective.train(), training, ds_config, objective.external_parameters())
    checkpoints = Checkpoints(folder.path / "checkpoints", folder.made_from)
    state = checkpoints.resume(engine) or {"step": 0, "seconds": 0.0, "loss": math.nan}
    if "stream" in state:
        stream.load_state_dict(state["stream"])
    metrics = Metrics(folder.path, name=folder.name, steps=training.steps, step=state["step"])
    began, earlier = time.perf_counter(), state["seconds"]
    try:
        for step in range(state["step"], training.steps):
            lr = learning_rate(training, step)
            values = mean_over_ranks(_batch(objective, engine, stream, accumulation, lr))
            state = {"step": step + 1, "seconds": earlier + time.perf_counter() - began, "loss": values["loss"]}
            if not math.isfinite(values["loss"]):
                raise UserError(f"{folder.name}: the loss is {values['loss']} at step {step}: lower the learning rate")
            values |= {"lr": lr, "gradient_norm": engine.gradient_norm()}
            metrics.log(step, values, tokens=training.batch * training.seq_len)
            if (step + 1) % training.save_every == 0 or step + 1 == training.steps:
                checkpoints.save(engine, step + 1, {**state, "stream": stream.state_dict()})
        return Result(
            weights=engine.parameters_on_rank0(),
            tokens=training.steps * training.batch * training.seq_len,
            parameters=parameters,
            seconds=state["seconds"],
            loss=state["loss"],
        )
    finally:
        metrics.close()
        engine.close()


def _batch(
    objective: Objective, engine: Engine, stream: TokenStream, accumulation: int, lr: float
) -> dict[str, Tensor]:
    """One optimizer step. Returns the loss and metrics, mean over the micro-batches of this rank."""
    total: dict[str, Tensor] = {}
    for _ in range(accumulation):
        input_ids = next(stream).to(device(), non_blocking=True)
        loss, metrics = engine.accumulate(input_ids=input_ids, **objective.teach(input_ids))
        for name, value in ({"loss": loss} | metrics).items():
            total[name] = total.get(name, 0) + value / accumulation
        engine.step(lr)
    return total
