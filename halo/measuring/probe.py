"""The evaluation amid training of stages 2 and 3 (`probe_every`): so a run that learns nothing is seen in minutes.

    cross_entropy, kl, ...        on windows of held-out text, as long as a sample: what the stage logs in training
    niah_single_1/2048, ...       exact-match recall at a length, of the variants in PROBED

Text, samples and the teacher's logits are made once, before the first step, and do not depend on the number of ranks.
The teacher supplies these logits as it does in training, wherever it is. They wait in host memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halo.config import CheckpointedTraining
from halo.context import Context
from halo.data.held_out import HeldOut, check_held_out
from halo.data.needle import NeedleSample
from halo.distributed import all_sum, device, on_rank0, rank, world_size
from halo.measuring.evaluation import needle_recall
from halo.models.tokenizer import load_tokenizer
from halo.teacher.batch import Batch
from halo.training.engine import split_batch
from halo.training.objectives import Headed
from halo.training.trainer import Probe

PROBED = ("niah_single_1", "niah_single_2")
"""A UUID, as in the third, is beyond small models."""
CHARACTERS_PER_TOKEN = 16
"""Characters of held-out text that are read for each token of the windows, and of the longest needle sample."""


@dataclass(frozen=True, kw_only=True)
class ProbeText:
    """What a probe measures on.

    Attributes:
        windows: [N, T] int64, T a training sample's length.
        needles: by the figure's name.
    """

    windows: Tensor
    needles: dict[str, list[NeedleSample]]


def check_probe(context: Context, stage: str) -> None:
    """Raises:
    UserError: the stage has probes, and there is no held-out text.
    """
    if context.settings(stage).probe_every:
        check_held_out(context.config.heldout)


def probe_of(context: Context, stage: str, objective: Headed) -> Probe | None:
    """The probe of a stage, by its settings; None if it has none. Every rank must call this, before training.

    Raises:
        UserError: the held-out text is too short.
    """
    training: CheckpointedTraining = context.settings(stage)
    if not training.probe_every:
        return None
    text = on_rank0(_text, context, training)
    return Probe(every=training.probe_every, measure=measure_of(objective, training, text))


def probed_lengths(training: CheckpointedTraining) -> tuple[int, ...]:
    """Tokens of the needle samples."""
    return training.probe_lengths or tuple(training.seq_len * times for times in (1, 2, 4))


def _text(context: Context, training: CheckpointedTraining) -> ProbeText:
    lengths = probed_lengths(training)
    count = training.probe_samples
    tokens = max(*lengths, training.seq_len * count)
    held_out = HeldOut(context.config.heldout, load_tokenizer(context.teacher), tokens * CHARACTERS_PER_TOKEN)
    needles = {f"{v}/{n}": held_out.needles(v, n, count, training.seed) for v in PROBED for n in lengths}
    return ProbeText(windows=held_out.windows(training.seq_len, count)[0], needles=needles)


def measure_of(objective: Headed, training: CheckpointedTraining, text: ProbeText) -> Callable[[], dict[str, float]]:
    """`Probe.measure`. Every rank must call this, and then the result; ranks run as many forwards."""
    losses = _Losses(objective, training, text.windows)
    tokens = split_batch(training)[0] * training.seq_len

    def measure() -> dict[str, float]:
        recall = {}
        for name, samples in text.needles.items():
            length = len(samples[0].prompt_ids) + len(samples[0].answer_ids)
            recall[name] = needle_recall(
                objective.student, samples, batch=max(1, tokens // length), group=objective.sequence, alike=True
            )
        return losses() | recall

    return measure


class _Losses:
    """What the objective logs of windows of text, mean over all windows.

    Ranks take micro-batches of windows in turn, those that share sequences the same. The last ones are filled up: a
    teacher on other ranks answers questions of one shape.
    """

    def __init__(self, objective: Headed, training: CheckpointedTraining, windows: Tensor):
        self._objective = objective
        self._windows = len(windows)
        micro_batch, _ = split_batch(training)
        degree = training.sequence_parallel
        stride = micro_batch * (world_size() // degree)
        self._batches: list[tuple[Batch, int]] = []
        """This rank's, on the host, and how many windows of each count. At least one is there: all ranks forward."""
        for first in range(rank() // degree * micro_batch, -(-len(windows) // stride) * stride, stride):
            rows = windows[[number % len(windows) for number in range(first, first + micro_batch)]]
            counted = max(0, min(micro_batch, len(windows) - first))
            self._batches.append((self._supplied(rows, max(1, counted)), counted))

    def _supplied(self, windows: Tensor, rows: int) -> Batch:
        """The first `rows` of a full micro-batch, with what the teacher supplies."""
        batch = Batch.on_host(windows[:rows], self._objective.separator)
        teacher = self._objective.teacher
        if teacher is None:
            return batch
        teacher.prefetch(Batch.on_host(windows).to(device()))
        logits = teacher.next()
        parts = [part[: len(part) // len(windows) * rows].cpu() for part in logits.parts]
        return replace(batch, teacher_logits=logits.with_parts(parts))

    def __call__(self) -> dict[str, float]:
        total: dict[str, Tensor] = {}
        for on_host, counted in self._batches:
            batch = on_host.to(device())
            if (logits := batch.teacher_logits) is not None:
                batch = replace(batch, teacher_logits=logits.with_parts([part.to(device()) for part in logits.parts]))
            for name, value in self._objective.held_out(batch).items():
                total[name] = total.get(name, 0) + value.double() * counted
        sums = all_sum(torch.stack(list(total.values()))) / (self._windows * self._objective.sequence.degree)
        return dict(zip(total, sums.tolist(), strict=True))
