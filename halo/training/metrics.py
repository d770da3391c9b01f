"""What one watches: a progress bar on rank 0, TensorBoard, a line a step in metrics.jsonl, and a profiler's trace.

A line holds what the trainer hands over (the loss and its parts, the learning rate, the gradient norm) and

    tokens                  so far, all ranks together
    step_s                  wall-clock seconds of the step, with all waiting, without `pause`
    tokens_per_s            of the step; tokens_per_s_gpu: of one GPU
    mfu                     useful FLOPs (halo/training/flops.py) over the GPUs' bf16 peak (halo/training/gpus.py); left
                            out where that is not known, as on a CPU
    data_wait_s, ...        seconds of the step inside of `waiting("data")`, ...: of the rank that waited longest
    peak_gib                most memory ever allocated: of the GPU, else of the process; the fullest rank
    reserved_gib            most memory ever held by torch's allocator; the fullest GPU
    checkpoint_s, ...       seconds in `pause("checkpoint")`, ... since the step before
    checkpoint_write_s      seconds of writing a checkpoint beside training, if one was published since then
"""

import json
import math
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils.tensorboard import SummaryWriter

from halo.distributed import all_sum, device, on_rank0, rank, world_size
from halo.errors import UserError
from halo.progress import progress_bar
from halo.run import atomic
from halo.training.gpus import gpu_of_device


def mean_over_ranks(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of each scalar over all ranks, in one collective."""
    names = sorted(values)
    total = all_sum(torch.stack([values[name].detach().double().mean() for name in names]))
    return dict(zip(names, (total / world_size()).tolist(), strict=True))


def max_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The greatest of each number over all ranks, in one collective."""
    if world_size() == 1:
        return values
    names = sorted(values)
    greatest = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device())
    dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
    return dict(zip(names, greatest.tolist(), strict=True))


def memory() -> dict[str, float]:
    """The most memory this process ever had, in GiB: the GPU's where there is one, else its own."""
    if torch.cuda.is_available():
        return {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def peak_flops() -> float | None:
    """The bf16 peak of this rank's GPU, in FLOP/s; None on a CPU and on GPUs that are not known."""
    gpu = gpu_of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if gpu is None else gpu.peak


class Metrics:
    """A training stage's record. Every rank must call `log` at every step; rank 0 writes.

    Args:
        folder: the stage's folder; TensorBoard's files go into `tensorboard/` in it.
        name: the bar's title.
        steps: the stage's length.
        step: where it starts, after a resume; what was recorded from there on is dropped.
        ranks: how many GPUs are at work, those of a teacher alone among them. None: those of the ranks that record.
        flops_per_token: useful ones, for MFU; 0: unknown, and MFU is left out.
        profile_from, profile_steps: rank 0 traces `profile_steps` steps, the first of them the 0-based `profile_from`,
            for TensorBoard and Chrome, into `tensorboard/`. 0 steps: none.

    Raises:
        UserError: nothing can be written there; on every rank.
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
        self._folder = folder
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops()
        self._ranks = world_size() if ranks is None else ranks
        self._waits: dict[str, list[Callable[[], float]]] = defaultdict(list)
        self._pauses: dict[str, float] = defaultdict(float)
        self._bar = progress_bar(steps, name, initial=step)
        self._writer: SummaryWriter | None = None
        self._lines: TextIO | None = None
        self._trace: _Trace | None = None
        self._failure: OSError | None = None
        self._excepthook = threading.excepthook
        self._guarded(lambda: self._open(step, profile_from, profile_steps))
        self.check()
        self._clock = time.perf_counter()

    def _open(self, step: int, profile_from: int, profile_steps: int) -> None:
        tensorboard = self._folder / "tensorboard"
        tensorboard.mkdir(parents=True, exist_ok=True)
        path = self._folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        before = [line for line in lines if _step_of(line) < step]
        with atomic(path) as partial:
            partial.write_text("".join(before))
        self._lines = open(path, "a", buffering=1)  # noqa: SIM115, closed in close()
        threading.excepthook = _but_tensorboards
        self._writer = SummaryWriter(str(tensorboard), purge_step=step)
        if profile_steps:
            self._trace = _Trace(tensorboard, profile_from, profile_from + profile_steps)
            self._trace.before(step)

    def _guarded(self, write: Callable[[], None]) -> None:
        """Call `write` on rank 0. What the file system refuses waits for `check`: the other ranks must hear of it."""
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

        def check() -> None:
            if self._failure is not None:
                raise UserError(
                    f"the metrics cannot be written to {self._folder} ({self._failure.strerror or self._failure}): "
                    "mend that, and the same command goes on from the latest checkpoint"
                ) from self._failure

        on_rank0(check)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Count what happens inside as `<what>_wait_s` of this step.

        On a GPU it is the time by which the current stream comes later to what follows: what runs in it inside, and
        what it stands still for. A host that waits while the GPU has work left costs nothing. Two events mark it, and
        nothing waits for them. On a CPU it is the wall-clock time.
        """
        stop = _device_timer() if torch.cuda.is_available() else _host_timer()
        yield
        self._waits[f"{what}_wait_s"].append(stop())

    @contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """What happens inside belongs to no step; the next line has it as `<what>_s`."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._pauses[f"{what}_s"] += seconds
        self._clock += seconds

    def note(self, name: str, value: float) -> None:
        """The next line has `value` under `name`."""
        self._pauses[name] = value

    def log(self, step: int, values: dict[str, float], *, tokens: int) -> None:
        """Record the 0-based step that just ended. Call it when its loss has been read: the step is over then.

        Args:
            values: scalars, `loss` among them; all are recorded.
            tokens: of this step, over all ranks. Every step has as many.
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
        self._bar.update()
        self._bar.set_postfix_str(_in_short(values), refresh=False)
        self._guarded(lambda: self._record(step, values))

    def _record(self, step: int, values: dict[str, float]) -> None:
        assert self._writer is not None and self._lines is not None
        self._lines.write(json.dumps({"step": step} | {k: _finite(v) for k, v in values.items()}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._trace is not None:
            self._trace.before(step + 1)

    def close(self) -> None:
        """Write what is left. A failure is `check`'s to raise."""
        self._bar.close()
        for part in (self._trace, self._writer, self._lines):
            if part is not None:
                self._guarded(part.close)
        threading.excepthook = self._excepthook


def _but_tensorboards(failed: threading.ExceptHookArgs) -> None:
    """Print what ends a thread, but not an OSError of TensorBoard's, which the next `add_scalar` raises."""
    if not (type(failed.thread).__module__.startswith("tensorboard.") and isinstance(failed.exc_value, OSError)):
        threading.__excepthook__(failed)


def _step_of(line: str) -> float:
    """The step that a line of metrics.jsonl records; infinity where a power cut left half of it."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


class _Trace:
    """A profiler's trace of the steps from `first` to before `last`. A start after `first` traces nothing."""

    def __init__(self, folder: Path, first: int, last: int):
        self._path = folder / f"steps-{first}-{last - 1}.pt.trace.json.gz"  # the name that TensorBoard's plugin reads
        self._first, self._last = first, last
        self._profiler: profile | None = None

    def before(self, step: int) -> None:
        if step == self._first:
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + torch.cuda.is_available()]
            self._profiler = profile(activities=activities)
            self._profiler.start()
        if step == self._last:
            self.close()

    def close(self) -> None:
        """Write what was traced; once."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._path))
            self._profiler = None


def _host_timer() -> Callable[[], Callable[[], float]]:
    """Start now; call it to stop; call what that gives for the seconds between."""
    began = time.perf_counter()

    def stop() -> Callable[[], float]:
        seconds = time.perf_counter() - began
        return lambda: seconds

    return stop


def _device_timer() -> Callable[[], Callable[[], float]]:
    """`_host_timer` in the current stream's time. Reading it waits for the stream to pass the end."""
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
    """What the bar shows."""
    parts = [f"loss={values['loss']:.4f}", f"tokens/s/GPU={values['tokens_per_s_gpu']:,.0f}"]
    if not torch.cuda.is_available():
        parts[1] = f"tokens/s={values['tokens_per_s']:,.0f}"
    if "mfu" in values:
        parts.append(f"MFU={values['mfu']:.1%}")
    return ", ".join(parts)


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
