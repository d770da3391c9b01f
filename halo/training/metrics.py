"""The record of a training stage: a progress bar, TensorBoard, one line a step in metrics.jsonl, a profiler's trace.

A line has the values that the trainer gives (the loss and its parts, the learning rate, the gradient norms), and

    tokens                  trained so far, by all ranks
    step_s                  wall-clock seconds of the step, with all waiting, without `pause`
    tokens_per_s            of the step; tokens_per_s_gpu: of one GPU
    mfu                     useful FLOPs (halo/training/flops.py) over the GPUs' bf16 peak (halo/training/gpus.py);
                            absent if one of them is not known, as on a CPU
    data_wait_s, ...        seconds of the step in `waiting("data")`, ...: of the rank that waited longest
    peak_gib                most memory allocated so far: of the GPU, else of the process; of the fullest rank
    reserved_gib            most memory that torch's allocator has held so far; of the fullest GPU
    probe/kl, ...           after the step, on held-out text (halo/measuring/probe.py)
    checkpoint_s, ...       seconds in `pause("checkpoint")`, ... since the step before
    checkpoint_write_s      seconds of writing a checkpoint beside training, if one was published since the step before
"""

import json
import math
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils.tensorboard import SummaryWriter

from halo.accelerator import on_gpu
from halo.distributed import all_sum, device, on_rank0, rank, world_size
from halo.errors import UserError
from halo.progress import progress_bar
from halo.run import atomic
from halo.training.gpus import gpu_of_device

PROBE = "probe/"
"""Begins the names of what a probe measured."""


def mean_over_ranks(values: dict[str, torch.Tensor], flags: dict[str, bool]) -> Callable[[], dict[str, float]]:
    """Begin one collective that makes the mean of each scalar over all ranks, and of each flag as 0 or 1.

    Returns:
        A function that waits for it, and not for what the GPU is given later, and returns the means.
    """
    pinned = on_gpu()
    numbers = torch.tensor([float(flag) for flag in flags.values()], dtype=torch.float64, pin_memory=pinned)
    scalars = torch.stack([value.detach().double().mean() for value in values.values()])
    total = all_sum(torch.cat([scalars, numbers.to(device(), non_blocking=True)])) / world_size()
    host = torch.empty(total.shape, dtype=total.dtype, pin_memory=pinned).copy_(total, non_blocking=True)
    copied = torch.cuda.Event() if pinned else None
    if copied is not None:
        copied.record()

    def read() -> dict[str, float]:
        if copied is not None:
            copied.synchronize()
        return dict(zip([*values, *flags], host.tolist(), strict=True))

    return read


def max_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The maximum of each number over all ranks, in one collective."""
    if world_size() == 1:
        return values
    names = sorted(values)
    greatest = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device())
    dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
    return dict(zip(names, greatest.tolist(), strict=True))


def memory() -> dict[str, float]:
    """The most memory that this process has used so far, in GiB: the GPU's if there is one, else the host's."""
    if on_gpu():
        return {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def peak_flops() -> float | None:
    """The bf16 peak of this rank's GPU, in FLOP/s; None on a CPU and on GPUs that are not known."""
    gpu = gpu_of_device(torch.cuda.get_device_name()) if on_gpu() else None
    return None if gpu is None else gpu.peak


class Metrics:
    """The record of a training stage. Every rank must call `log` at every step; rank 0 writes.

    Args:
        folder: the stage's folder; TensorBoard's files go into `tensorboard/` in it.
        name: the bar's title.
        steps: how many steps the stage has.
        step: the first step, after a resume; records of this step and of later ones are dropped.
        ranks: how many GPUs work on the stage, those of a dedicated teacher included. None: those that train.
        flops_per_token: useful FLOPs, for MFU; 0: not known, and MFU is left out.
        profile_from, profile_steps: rank 0 traces `profile_steps` steps from the 0-based `profile_from` on, for
            TensorBoard and Chrome, into `tensorboard/`. 0 steps: no trace.

    Raises:
        UserError: the folder cannot be written to; on every rank.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        steps: int,
        step: int = 0,
        ranks: int | None = None,
        flops_per_token: float = 0.0,
        profile_from: int = 0,
        profile_steps: int = 0,
    ):
        self._folder, self._name, self._steps = folder, name, steps
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops()
        self._ranks = world_size() if ranks is None else ranks
        self._profiled = range(profile_from, profile_from + profile_steps)
        self._waits: dict[str, list[Callable[[], float]]] = defaultdict(list)
        self._pauses: dict[str, float] = defaultdict(float)
        self._probed: dict[str, float] = {}
        """What was last probed: the bar shows it until the next."""
        self._writer: SummaryWriter | None = None
        self._lines: TextIO | None = None
        self._trace: _Trace | None = None
        self._failure: OSError | None = None
        self._excepthook = threading.excepthook
        self._begin(step)

    def rewind(self, step: int) -> None:
        """Drop the records of `step` and of later steps; `step` is the next one. Every rank must call this.

        Raises:
            UserError: something could not be written; on every rank.
        """
        self.close()
        self.check()
        self._waits.clear()
        self._pauses.clear()
        self._begin(step)

    def _begin(self, step: int) -> None:
        self._bar = progress_bar(self._steps, self._name, initial=step)
        self._guarded(partial(self._open, step))
        self.check()
        self._clock = time.perf_counter()

    def _open(self, step: int) -> None:
        tensorboard = self._folder / "tensorboard"
        tensorboard.mkdir(parents=True, exist_ok=True)
        path = self._folder / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
        before = [line for line in lines if _step_of(line) < step]
        with atomic(path) as partial:
            partial.write_text("".join(before))
        self._lines = open(path, "a", buffering=1)  # noqa: SIM115, closed in close()
        threading.excepthook = _all_but_tensorboard
        self._writer = SummaryWriter(str(tensorboard), purge_step=step)
        if self._profiled:
            self._trace = _Trace(tensorboard, self._profiled)
            self._trace.before(step)

    def _guarded(self, write: Callable[[], None]) -> None:
        """Call `write` on rank 0. If the file system refuses, `check` raises that on all ranks: they end together."""
        if rank() == 0:
            try:
                write()
            except OSError as failure:
                self._failure = self._failure or failure

    def has_failed(self) -> bool:
        """Whether this rank could not write. Then every rank must call `check`."""
        return self._failure is not None

    def check(self) -> None:
        """Raises:
        UserError: something could not be written; on every rank.
        """
        on_rank0(self._check)

    def _check(self) -> None:
        if self._failure is not None:
            raise UserError(
                f"the metrics cannot be written to {self._folder} ({self._failure.strerror or self._failure}): "
                "mend that, and the same command resumes from the latest checkpoint"
            ) from self._failure

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Count the time inside as `<what>_wait_s` of this step.

        On a GPU it is the time by which the current stream is delayed: the work inside, and its waiting. A host that
        waits while the GPU still has work costs nothing. Two events measure it, and nothing waits for them. On a CPU it
        is the wall-clock time.
        """
        stop = _device_timer() if on_gpu() else _host_timer()
        yield
        self._waits[f"{what}_wait_s"].append(stop())

    @contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """The time inside belongs to no step; the next line has it as `<what>_s`."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._pauses[f"{what}_s"] += seconds
        self._clock += seconds

    def note(self, name: str, value: float) -> None:
        """Add `value` to the next line, as `name`."""
        self._pauses[name] = value

    def log(self, step: int, values: dict[str, float], *, tokens: int) -> None:
        """Record the 0-based step that just ended. Call it after the loss was read: then its gradients are there.

        The GPU may still make the optimizer's step: the time of that is in the next step's.

        Args:
            values: scalars to record, `loss` among them.
            tokens: of this step, over all ranks; the same in every step.
        """
        seconds = time.perf_counter() - self._clock
        self._clock += seconds
        waits = {name: sum(read() for read in timers) for name, timers in self._waits.items()}
        values = values | {
            "tokens": (step + 1) * tokens,
            "step_s": seconds,
            "tokens_per_s": tokens / seconds,
            "tokens_per_s_gpu": tokens / seconds / self._ranks,
        }
        if self._peak_flops and self._flops_per_token:
            values["mfu"] = values["tokens_per_s_gpu"] * self._flops_per_token / self._peak_flops
        values |= max_over_ranks(waits | memory()) | self._pauses
        self._waits.clear()
        self._pauses.clear()
        self._probed = {name: value for name, value in values.items() if name.startswith(PROBE)} or self._probed
        self._bar.update()
        self._bar.set_postfix_str(_in_short(self._probed | values), refresh=False)
        self._guarded(partial(self._record, step, values))

    def _record(self, step: int, values: dict[str, float]) -> None:
        assert self._writer is not None and self._lines is not None
        self._lines.write(json.dumps({"step": step} | {k: _finite(v) for k, v in values.items()}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._trace is not None:
            self._trace.before(step + 1)

    def close(self) -> None:
        """Write the rest. `check` raises a failure."""
        self._bar.close()
        for part in (self._trace, self._writer, self._lines):
            if part is not None:
                self._guarded(part.close)
        threading.excepthook = self._excepthook


def _all_but_tensorboard(failed: threading.ExceptHookArgs) -> None:
    """Print the exception that ends a thread, but not TensorBoard's OSError: the next `add_scalar` raises it."""
    if not (type(failed.thread).__module__.startswith("tensorboard.") and isinstance(failed.exc_value, OSError)):
        threading.__excepthook__(failed)


def _step_of(line: str) -> float:
    """The step of a line in metrics.jsonl; infinity if the line is damaged: a power cut leaves half of one."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


class _Trace:
    """A profiler's trace of some steps. A run that starts or resumes after the first of them has no trace."""

    def __init__(self, folder: Path, steps: range):
        self._path = folder / f"steps-{steps[0]}-{steps[-1]}.pt.trace.json.gz"  # TensorBoard's plugin needs this suffix
        self._steps = steps
        self._profiler: profile | None = None

    def before(self, step: int) -> None:
        if step == self._steps[0]:
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + on_gpu()]
            self._profiler = profile(activities=activities)
            self._profiler.start()
        if step == self._steps.stop:
            self.close()

    def close(self) -> None:
        """Write the trace, once."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._path))
            self._profiler = None


def _host_timer() -> Callable[[], Callable[[], float]]:
    """A timer that starts now. Call it to stop it, and call the result to read the seconds between."""
    began = time.perf_counter()

    def stop() -> Callable[[], float]:
        seconds = time.perf_counter() - began
        return lambda: seconds

    return stop


def _device_timer() -> Callable[[], Callable[[], float]]:
    """As `_host_timer`, in the time of the current stream. Reading it waits until the stream has passed the stop."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()

    def stop() -> Callable[[], float]:
        end.record()

        def read() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1000

        return read

    return stop


def _in_short(values: dict[str, float]) -> str:
    """The text beside the bar."""
    parts = [f"loss={values['loss']:.4f}", f"tokens/s/GPU={values['tokens_per_s_gpu']:,.0f}"]
    if not on_gpu():
        parts[1] = f"tokens/s={values['tokens_per_s']:,.0f}"
    if "mfu" in values:
        parts.append(f"MFU={values['mfu']:.1%}")
    if probed := {name.removeprefix(PROBE): value for name, value in values.items() if name.startswith(PROBE)}:
        main = "kl" if "kl" in probed else "cross_entropy"
        recall = [f"{value:.0%}" for name, value in probed.items() if "/" in name]
        parts.append(f"held-out {main}={probed[main]:.4f}, recall={'/'.join(recall)}")
    return ", ".join(parts)


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
