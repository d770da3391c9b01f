"""A rank at its first step, for the tests of tuning: importable, with picklable arguments."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver

from halo.training.tuning import take_turns

CONFIGS = [triton.Config({"BLOCK": size}) for size in (16, 32)]


@triton.jit
def kernel(BLOCK: triton.language.constexpr):
    pass


def look(folder: Path, shapes: list[str], log: Path, until: Path | None = None) -> None:
    """Look for what tuning found for each shape, or tune it, and write so into `log`.

    Args:
        until: a file that tuning waits for.
    """
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    take_turns(folder)
    for shape in shapes:
        tuner = Autotuner(kernel, ["BLOCK"], CONFIGS, [], None, None, cache_results=True)
        tuner.check_disk_cache((shape,), CONFIGS, lambda tuner=tuner, shape=shape: tune(tuner, shape, log, until))
        assert tuner.cache[shape,].kwargs == {"BLOCK": 32}


def tune(tuner: Autotuner, shape: str, log: Path, until: Path | None) -> None:
    with log.open("a") as lines:
        lines.write(f"{shape}\n")
    while until is not None and not until.exists():
        time.sleep(0.01)
    tuner.configs_timings = {config: [1 / config.kwargs["BLOCK"]] for config in CONFIGS}
    tuner.cache[shape,] = CONFIGS[1]
