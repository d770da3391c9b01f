"""What all benchmarks use to measure and report: medians of device events, peak memory, the machine and versions."""

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

PACKAGES = ("torch", "triton", "fla-core", "liger-kernel", "transformers", "deepspeed")


def header(packages: Sequence[str] = PACKAGES, *, gpu: bool = True) -> str:
    """The first lines of a report: the command, the machine and the versions.

    Args:
        gpu: whether the benchmark needs a GPU.

    Raises:
        SystemExit: it needs a GPU, and there is none.
    """
    if gpu and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    spec = sys.modules["__main__"].__spec__
    command = ["python", *(["-m", spec.name] if spec else [sys.argv[0]]), *sys.argv[1:]]
    machine = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if gpu else _processor()
    return f"{' '.join(command)}\n{machine}, Python {platform.python_version()}, {', '.join(versions)}\n"


def _processor() -> str:
    cores = len(os.sched_getaffinity(0))
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{cores} x {names[0] if names else platform.machine()}"


def milliseconds(run: Callable[[], Any], *, repeats: int = 20, warm_up: int = 3) -> float:
    """The median time of `run` on the device, after `warm_up` runs."""
    return milliseconds_in_turn({"": run}, repeats=repeats, warm_up=warm_up)[""]


def milliseconds_in_turn(
    runs: Mapping[str, Callable[[], Any]], *, repeats: int = 20, warm_up: int = 3
) -> dict[str, float]:
    """The median milliseconds of each, by name. They run in turn, so that a hot, slower GPU slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warm_up + repeats):
        for name, run in runs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: median(each[warm_up:]) for name, each in times.items()}


def as_graph(run: Callable[[], Any]) -> Callable[[], None]:
    """`run`, recorded as a CUDA graph. Its replay is the GPU's work alone, without the host's launches."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is tuned or compiled comes before the recording
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_gib(run: Callable[[], Any]) -> float:
    """GiB allocated at the peak of `run`, beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers are right-aligned."""
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = ["| " + " | ".join(columns) + " |", "| :-- |" + " --: |" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])
