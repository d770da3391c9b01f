"""The one training loop. A stage is an objective (a model and a loss); this runs it.

objective.ask(input_ids)       what the frozen teacher says of a micro-batch, outside the engine, one ahead
objective(input_ids, ...)      the loss, inside the engine
"""

import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from halo.config import Training
from halo.data.storage import cache_in
from halo.data.stream import TokenStream
from halo.distributed import SLOW_LIMIT, STEP_LIMIT, device, rank, waits_of_at_most, world_size
from halo.errors import Stopped, UserError
from halo.run import StageFolder
from halo.stop import stop_requests
from halo.training.checkpoint import Checkpoints, Progress
from halo.training.engine import Engine, split_batch, whole_size
from halo.training.look_ahead import Answer, LookAhead
from halo.training.metrics import Metrics, mean_over_ranks

MAX_RETURNS = 3
"""How often a run goes back to one checkpoint, for losses and gradients that are not finite, before it gives up."""


class Objective(nn.Module):
    """What a stage trains. Its parameters are the trained ones; a frozen teacher must not be registered on it."""

    clip_apart: ClassVar[bool] = False
    """Whether `clip` is of each layer's gradient norm, not of all layers' together."""

    def ask(self, input_ids: Tensor) -> Answer:
        """Ask the teacher about [B, T] tokens on the host. Call the result for forward's keywords, without gradient."""
        return dict

    def ranks(self) -> int:
        """How many ranks work on it: those that train, and those that hold its teacher alone."""
        return world_size()

    def forward(self, input_ids: Tensor, **taught: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, T] tokens -> the mean loss (a scalar), and scalars to log."""
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> float:
        """Useful FLOPs of one token of a sequence (halo/training/flops.py); 0: not known."""
        return 0.0

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
    skipped: int
    """Steps left out, their loss or gradient not being finite."""

    def summary(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "parameters": self.parameters,
            "seconds": round(self.seconds, 1),
            "loss": self.loss,
            "skipped": self.skipped,
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
    objective: Objective, training: Training, *, shards: str | Path, folder: StageFolder, ds_config: dict[str, Any]
) -> Result:
    """Train `objective` on the samples in `shards`, from the last checkpoint in `folder` or from the start.

    Raises:
        UserError: settings that do not fit the ranks or the data, a checkpoint that cannot be read or written, metrics
            that cannot be written, losses or gradients that stay other than finite.
        Stopped: a signal asked for it (halo/stop.py), and the state is saved.
    """
    micro_batch, accumulation = split_batch(training)
    degree = training.sequence_parallel  # ranks that share a sequence read the same samples
    stream = TokenStream(
        shards,
        micro_batch=micro_batch,
        seed=training.seed,
        rank=rank() // degree,
        world_size=world_size() // degree,
        cache=cache_in(training.shards_cache, training.shards_cache_gb),
    )
    torch.manual_seed(training.seed)
    parameters = sum(whole_size(p) for p in objective.parameters() if p.requires_grad)
    with waits_of_at_most(SLOW_LIMIT):
        external = objective.external_parameters()
        engine = Engine(objective.train(), training, ds_config, external, clip_apart=objective.clip_apart)
        checkpoints = Checkpoints(folder.path / "checkpoints", folder.made_from, training)
        progress = checkpoints.resume(engine) or Progress(stream=stream.state_dict())
    stream.load_state_dict(progress.stream)
    ahead = LookAhead(stream, objective.ask)
    metrics = _metrics(folder, training, progress, objective)
    began = time.perf_counter() - progress.seconds
    returns: Counter[int] = Counter()
    limit = SLOW_LIMIT  # the first step compiles
    try:
        with stop_requests() as asked_to_stop:
            while progress.step < training.steps:
                lr = learning_rate(training, progress.step)
                with waits_of_at_most(limit):
                    last = progress.step == training.steps - 1
                    values = _batch(engine, ahead, accumulation, lr, metrics, last=last)
                    values |= _flags(
                        stop=asked_to_stop(), written=checkpoints.is_written(), unrecorded=metrics.has_failed()
                    )
                    means = mean_over_ranks(values)
                    stop, written, unrecorded = (means.pop(name) for name in ("stop", "written", "unrecorded"))
                    progress = progress.after(
                        loss=means["loss"],
                        skipped=engine.skipped(),
                        seconds=time.perf_counter() - began,
                        stream=ahead.position(),
                    )
                    means |= {"lr": lr, "skipped": progress.skipped} | engine.gradient_norms()
                    metrics.log(progress.step - 1, means, tokens=training.batch * training.seq_len)
                limit = STEP_LIMIT
                if written == 1 or unrecorded:
                    _publish(checkpoints, metrics)
                if unrecorded:
                    metrics.check()
                if progress.skipped_in_a_row > training.max_skipped:
                    progress = _go_back(checkpoints, engine, progress, returns, folder.name)
                    metrics.close()
                    metrics.check()
                    metrics = _metrics(folder, training, progress, objective)
                    due = stop  # where the data stands now is not yet in a checkpoint
                else:
                    due = stop or _is_due(training, progress)
                if due:
                    _save(checkpoints, engine, progress, metrics)
                if stop or progress.step == training.steps:
                    _publish(checkpoints, metrics)
                if stop:
                    raise Stopped(f"{folder.name}: stopped after {progress.step} of {training.steps} steps, and saved")
            metrics.close()
            metrics.check()
        if math.isnan(progress.loss):
            raise UserError(f"{folder.name}: no step had a finite loss and gradient: lower the learning rate")
        return Result(
            weights=engine.parameters_on_rank0(),
            tokens=training.steps * training.batch * training.seq_len,
            parameters=parameters,
            seconds=progress.seconds,
            loss=progress.loss,
            skipped=progress.skipped,
        )
    finally:
        try:
            metrics.close()
        finally:
            engine.close()


def _metrics(folder: StageFolder, training: Training, progress: Progress, objective: Objective) -> Metrics:
    return Metrics(
        folder.path,
        name=folder.name,
        steps=training.steps,
        step=progress.step,
        ranks=objective.ranks(),
        flops_per_token=objective.flops_per_token(training.seq_len),
        profile_from=training.profile_from,
        profile_steps=training.profile_steps,
    )


def _batch(
    engine: Engine, ahead: LookAhead, accumulation: int, lr: float, metrics: Metrics, *, last: bool
) -> dict[str, Tensor]:
    """One optimizer step. Returns the loss and metrics, mean over the micro-batches of this rank.

    Args:
        last: nothing follows: the teacher is asked about nothing more.
    """
    total: dict[str, Tensor] = {}
    for left in reversed(range(accumulation)):
        loss, values = engine.accumulate(**ahead.take(metrics))
        for name, value in ({"loss": loss} | values).items():
            total[name] = total.get(name, 0) + value / accumulation
        if left or not last:
            ahead.ask(metrics)  # forward and backward are under way, and the step will wait for them
        engine.step(lr)
    return total


def _flags(**values: bool) -> dict[str, Tensor]:
    """What a rank tells the others of itself, beside the metrics: their mean is the share of ranks where it is so."""
    return {name: torch.tensor(float(value), device=device()) for name, value in values.items()}


def _save(checkpoints: Checkpoints, engine: Engine, progress: Progress, metrics: Metrics) -> None:
    _publish(checkpoints, metrics)
    with metrics.pause("checkpoint"), waits_of_at_most(SLOW_LIMIT):
        checkpoints.save(engine, progress)


def _publish(checkpoints: Checkpoints, metrics: Metrics) -> None:
    """Wait until what was saved last is written, if it is not published yet, and make it the latest checkpoint."""
    with metrics.pause("checkpoint"), waits_of_at_most(SLOW_LIMIT):
        seconds = checkpoints.publish()
    if seconds is not None:
        metrics.note("checkpoint_write_s", seconds)


def _is_due(training: Training, progress: Progress) -> bool:
    """Whether to save. Not amid skipped steps: one goes back to a checkpoint from which training went well."""
    due = progress.step % training.save_every == 0 and not progress.skipped_in_a_row
    return due or progress.step == training.steps


def _go_back(
    checkpoints: Checkpoints, engine: Engine, progress: Progress, returns: Counter[int], name: str
) -> Progress:
    """To the last checkpoint, but with the stream where it stands: past the data that gave no finite loss.

    Args:
        returns: how often this process went back to a checkpoint, by its step.
    """
    ended = f"{name}: {progress.skipped_in_a_row} steps in a row had no finite loss and gradient"
    checkpoints.publish()
    saved = checkpoints.resume(engine)
    if saved is None:
        raise UserError(f"{ended}, the last of them step {progress.step - 1}: lower the learning rate")
    returns[saved.step] += 1
    if returns[saved.step] > MAX_RETURNS:
        raise UserError(f"{ended}, as after every return to step {saved.step}: lower the learning rate")
    if rank() == 0:
        print(f"{ended}: back to step {saved.step}, with the data that follows", flush=True)
    return replace(progress, step=saved.step, loss=saved.loss, skipped_in_a_row=0)
