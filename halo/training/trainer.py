"""The one training loop. A stage is an objective (a model and a loss); `train` runs it.

A step: forward and backward of each micro-batch, while the teacher already works on the next one (look_ahead.py); the
optimizer; one collective for the metrics and what the ranks must agree on; the record.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from halo.accelerator import on_gpu
from halo.config import Training
from halo.data.storage import cache_in
from halo.data.stream import TokenStream
from halo.distributed import SLOW_LIMIT, STEP_LIMIT, on_rank0, rank, waits_of_at_most, world_size
from halo.errors import Stopped, UserError
from halo.parallel.activations import KeptLayers
from halo.run import StageFolder
from halo.stop import stop_requests
from halo.teacher.batch import Batch
from halo.teacher.colocated import TeacherSource
from halo.training.checkpoint import Checkpoints, TrainingState
from halo.training.engine import Engine, split_batch, whole_size
from halo.training.look_ahead import LookAhead
from halo.training.metrics import PROBE, Metrics, mean_over_ranks
from halo.training.tuning import report_tuning

MAX_RETURNS = 3
"""How often a run returns to one checkpoint, because losses or gradients are not finite, before it ends."""


class Objective(nn.Module):
    """What a stage trains: a model and a loss. Its parameters are those to train; no frozen teacher is a submodule."""

    clip_apart: ClassVar[bool] = False
    """Whether each layer's gradient is clipped by its own norm, not by the norm of all."""

    late_gradients: ClassVar[bool] = False
    """Whether backward gives away all gradients at its end."""

    teacher: TeacherSource | None = None
    """Supplies the `teacher_logits` of each batch. None: the loss needs none."""

    separator: int | None = None
    """The token that ends a document, if documents are isolated from each other. None: they are not."""

    kept_layers: KeptLayers | None = None
    """The checkpointed layers that keep their activations. None: no layer is checkpointed."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a micro-batch, and values to log; scalars."""
        raise NotImplementedError

    def runs_alike(self) -> bool:
        """Whether every micro-batch of a shape runs the same kernels, and exchanges nothing with other ranks."""
        return False

    def words(self) -> int:
        """How many tokens the model has: those of its batches must be smaller."""
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> float:
        """Useful FLOPs for one token of a sequence (halo/training/flops.py); 0: not known."""
        return 0.0

    def external_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """(module, parameter) pairs where the module's forward reads a parameter that a child owns."""
        return []


@dataclass(frozen=True, kw_only=True)
class Probe:
    """An evaluation amid training, which changes nothing of it."""

    every: int
    """Steps between two of them. The last step has one too."""
    measure: Callable[[], dict[str, float]]
    """Measures the objective's model on held-out text, on all ranks; the same scalars on each."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a stage's training, and its cost."""

    weights: dict[str, Tensor]
    """The trained parameters, whole, on rank 0 (empty elsewhere)."""
    tokens: int
    parameters: int
    seconds: float
    loss: float
    skipped: int
    """Steps that were skipped, because a loss or gradient was not finite."""

    def summary(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "parameters": self.parameters,
            "seconds": round(self.seconds, 1),
            "loss": self.loss,
            "skipped": self.skipped,
        }


def learning_rate(training: Training, step: int) -> float:
    """The learning rate of the 0-based `step`: linear warm-up from 0, then the schedule (Appendix B, Table 12)."""
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
    objective: Objective,
    training: Training,
    *,
    shards: str | Path,
    folder: StageFolder,
    ds_config: dict[str, Any],
    probe: Probe | None = None,
) -> Result:
    """Train `objective` on the samples in `shards`, from the latest checkpoint in `folder`, or else from the start.

    Args:
        probe: measures the model now and then. None: nothing does.

    Raises:
        UserError: settings that do not fit the ranks or the data; a checkpoint that cannot be read or written; metrics
            that cannot be written; losses or gradients that are not finite, again and again.
        Stopped: a signal asked for it (halo/stop.py), and the state is saved.
    """
    loop = _Loop(objective, training, shards=shards, folder=folder, ds_config=ds_config, probe=probe)
    try:
        with stop_requests() as stop_requested:
            while not loop.is_done():
                agreed = loop.train_step(stop_requested)
                if agreed.checkpoint_written or agreed.metrics_failed:
                    loop.publish_checkpoint()
                if agreed.metrics_failed:
                    loop.check_metrics()
                returned = loop.must_return()
                if returned:
                    loop.return_to_checkpoint()
                # After a return, only the data's position differs from a checkpoint: it is saved if the run stops.
                if agreed.must_stop or (loop.is_checkpoint_due() and not returned):
                    loop.save_checkpoint()
                if agreed.must_stop or loop.is_done():
                    loop.publish_checkpoint()
                if agreed.must_stop:
                    raise Stopped(
                        f"{folder.name}: stopped after {loop.state.step} of {training.steps} steps, and saved"
                    )
            loop.close_metrics()
        return loop.result()
    finally:
        loop.close()


@dataclass(frozen=True, kw_only=True)
class _Agreed:
    """What all ranks know after a step, from each rank's flags."""

    must_stop: bool
    """Some rank was asked to stop."""
    checkpoint_written: bool
    """All ranks have written their parts of the checkpoint that is not published yet."""
    metrics_failed: bool
    """Some rank could not write the metrics."""

    @classmethod
    def of_means(cls, means: dict[str, float]) -> "_Agreed":
        """From the means of the flags over the ranks, which it takes out: above 0 means some rank, 1 means all."""
        return cls(
            must_stop=means.pop("stop") > 0,
            checkpoint_written=means.pop("checkpoint_written") == 1,
            metrics_failed=means.pop("metrics_failed") > 0,
        )


class _Loop:
    """The parts of a training loop, and how far it is. Every rank must call each method."""

    def __init__(
        self,
        objective: Objective,
        training: Training,
        *,
        shards: str | Path,
        folder: StageFolder,
        ds_config: dict[str, Any],
        probe: Probe | None,
    ):
        self._training, self._name, self._folder = training, folder.name, folder.path
        self._probe = probe
        micro_batch, self._accumulation = split_batch(training)
        degree = training.sequence_parallel  # ranks that share a sequence read the same samples
        stream = TokenStream(
            shards,
            micro_batch=micro_batch,
            seed=training.seed,
            rank=rank() // degree,
            world_size=world_size() // degree,
            cache=cache_in(training.shards_cache, training.shards_cache_gb),
            words=objective.words(),
        )
        torch.manual_seed(training.seed)
        self._parameters = sum(whole_size(p) for p in objective.parameters() if p.requires_grad)
        with waits_of_at_most(SLOW_LIMIT):
            external, self._kept_layers = objective.external_parameters(), objective.kept_layers
            self._engine = Engine(
                objective.train(),
                training,
                ds_config,
                external,
                clip_apart=objective.clip_apart,
                runs_alike=objective.runs_alike(),
                late_gradients=objective.late_gradients,
            )
            self._checkpoints = Checkpoints(folder.path / "checkpoints", folder.made_from, training)
            self.state = self._checkpoints.resume(self._engine) or TrainingState(stream=stream.state_dict())
        stream.load_state_dict(self.state.stream)
        teacher = objective.teacher
        self._metrics = Metrics(
            folder.path,
            name=folder.name,
            steps=training.steps,
            step=self.state.step,
            ranks=world_size() + (teacher.ranks if teacher is not None else 0),
            flops_per_token=objective.flops_per_token(training.seq_len),
            profile_from=training.profile_from,
            profile_steps=training.profile_steps,
        )
        self._batches = LookAhead(
            stream, self._metrics, teacher, objective.separator, after_backward=self._engine.zero_stage < 3
        )
        self._began = time.perf_counter() - self.state.seconds
        self._returns: Counter[int] = Counter()
        """How often this process returned to a checkpoint, by its step."""
        self._limit = SLOW_LIMIT  # the first step compiles

    def is_done(self) -> bool:
        return self.state.step >= self._training.steps

    def train_step(self, stop_requested: Callable[[], bool]) -> _Agreed:
        """Train on one batch, and record that."""
        lr = learning_rate(self._training, self.state.step)
        with waits_of_at_most(self._limit):
            means = self._optimize(lr, stop_requested)
            agreed = _Agreed.of_means(means)
            self.state = self.state.after_step(
                loss=means["loss"],
                skipped=self._engine.skipped(),
                seconds=time.perf_counter() - self._began,
                stream=self._batches.position(),
            )
            if self._kept_layers is not None:
                self._kept_layers.adapt()
            means |= {"lr": lr, "skipped": self.state.skipped} | self._engine.gradient_norms() | self._probed()
            tokens = self._training.batch * self._training.seq_len
            self._metrics.log(self.state.step - 1, means, tokens=tokens)
            if self._limit == SLOW_LIMIT:
                report_tuning()
        self._limit = STEP_LIMIT
        return agreed

    def _optimize(self, lr: float, stop_requested: Callable[[], bool]) -> dict[str, float]:
        """Forward, backward, and the optimizer's step.

        Returns:
            Loss and metrics, means over the micro-batches and ranks, and of the flags that `_Agreed` has. They are on
            their way before the step: the host does not wait for it, and prepares the next one meanwhile.
        """
        is_last_step = self.state.step == self._training.steps - 1
        total: dict[str, Tensor] = {}
        means: Callable[[], dict[str, float]] | None = None
        for left in reversed(range(self._accumulation)):
            loss, values = self._engine.accumulate(next(self._batches))
            for name, value in ({"loss": loss} | values).items():
                total[name] = total.get(name, 0) + value / self._accumulation
            if not left:
                flags = {"stop": stop_requested(), "checkpoint_written": self._checkpoints.is_written()}
                means = mean_over_ranks(total, flags | {"metrics_failed": self._metrics.has_failed()})
            if left or not is_last_step:
                self._batches.prefetch()  # while the GPU works on forward and backward; the step will wait for them
            self._engine.step(lr)
        assert means is not None
        return means()

    def _probed(self) -> dict[str, float]:
        """What the probe measures after this step; nothing if it is not due."""
        if self._probe is None or not (self.state.step % self._probe.every == 0 or self.is_done()):
            return {}
        with self._metrics.pause("probe"), waits_of_at_most(SLOW_LIMIT):
            if on_gpu():
                torch.cuda.synchronize()  # a teacher in another stream may use the same buffers, and has its own time
            return {PROBE + name: value for name, value in self._engine.measure(self._probe.measure).items()}

    def publish_checkpoint(self) -> None:
        """Wait until the last checkpoint is written, if it is not published yet, and publish it."""
        with self._metrics.pause("checkpoint"), waits_of_at_most(SLOW_LIMIT):
            seconds = self._checkpoints.publish()
        if seconds is not None:
            self._metrics.note("checkpoint_write_s", seconds)

    def is_checkpoint_due(self) -> bool:
        """Not amid skipped steps: a run returns to a checkpoint from which training went well."""
        due = self.state.step % self._training.save_every == 0 and not self.state.skipped_in_a_row
        return due or self.is_done()

    def save_checkpoint(self) -> None:
        """Begin to write a checkpoint, after the one before is published."""
        self.publish_checkpoint()
        with self._metrics.pause("checkpoint"), waits_of_at_most(SLOW_LIMIT):
            self._checkpoints.save(self._engine, self.state)

    def must_return(self) -> bool:
        """Whether too many steps in a row were skipped, or the last of all: a run does not end amid them."""
        return self.state.skipped_in_a_row > (0 if self.is_done() else self._training.max_skipped)

    def return_to_checkpoint(self) -> None:
        """Return to the latest checkpoint, but not to its data: train on with the data after the skipped steps.

        Raises:
            UserError: there is no checkpoint, or the run has returned to it too often.
        """
        ended = f"{self._name}: {self.state.skipped_in_a_row} steps in a row had no finite loss and gradient"
        self._checkpoints.publish()
        saved = self._checkpoints.resume(self._engine)
        if saved is None:
            raise UserError(f"{ended}, the last of them step {self.state.step - 1}: lower the learning rate")
        self._returns[saved.step] += 1
        if self._returns[saved.step] > MAX_RETURNS:
            raise UserError(f"{ended}, as after every return to step {saved.step}: lower the learning rate")
        if rank() == 0:
            print(f"{ended}: back to step {saved.step}, with the data that follows", flush=True)
        self.state = replace(self.state, step=saved.step, loss=saved.loss, skipped_in_a_row=0)
        self._metrics.rewind(saved.step)

    def check_metrics(self) -> None:
        """Raises:
        UserError: the metrics could not be written; on every rank.
        """
        self._metrics.check()

    def close_metrics(self) -> None:
        """As `check_metrics`, after the rest of them is written."""
        self._metrics.close()
        self._metrics.check()

    def result(self) -> Result:
        """Raises:
        UserError: a trained weight is not finite; on every rank.
        """
        weights = self._engine.parameters_on_rank0()
        on_rank0(lambda: self._check_finite(weights))
        return Result(
            weights=weights,
            tokens=self._training.steps * self._training.batch * self._training.seq_len,
            parameters=self._parameters,
            seconds=self.state.seconds,
            loss=self.state.loss,
            skipped=self.state.skipped,
        )

    def _check_finite(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise UserError(
                    f"{self._name}: after step {self.state.step - 1}, weights in {name} are not finite: "
                    f"lower the learning rate, and remove {self._folder} to train it anew"
                )

    def close(self) -> None:
        try:
            self._metrics.close()
        finally:
            self._engine.close()
