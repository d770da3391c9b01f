"""fla's kernels are tuned once on a machine: by one rank, while the others wait for what it finds.

A kernel of fla measures its configurations when it meets a new shape, and Triton keeps what it found. Here that is kept
on the machine's own disk, not in a home that nodes share, and the ranks of a machine take turns.

Configurations that `benchmarks/tune.py` measured on a kind of GPU, if the project has them, need no tuning at all.
"""

import hashlib
import importlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halo.accelerator import on_gpu
from halo.data.locks import exclusive
from halo.distributed import all_sum, say
from halo.errors import UserError
from hypenet.kernels import has_triton

MEASURED = Path(__file__).parent / "tuned"
"""<GPU>/<kernel>.json, as fla reads them."""

_seconds: list[float] = []
"""What this process spent on tuning, by kernel and shape."""


def tune_once() -> None:
    """Have this machine's ranks share what tuning finds. Call it before any kernel runs. Without a GPU it does nothing.

    Triton's and fla's variables (`TRITON_CACHE_DIR`, `TRITON_HOME`, `FLA_CONFIG_DIR`, `FLA_CACHE_MODE`,
    `FLA_CACHE_RESULTS`) stay as they are set.

    Raises:
        UserError: the folder cannot be made, or is another user's.
    """
    if on_gpu() and has_triton():
        folder = own_folder()
        os.environ |= cache_variables(folder, torch.cuda.get_device_name())
        take_turns(folder)


def own_folder() -> Path:
    """A folder of this user alone on this machine's disk: in TMPDIR, or in /tmp.

    Raises:
        UserError: it cannot be made, or is another user's, who could put kernels there.
    """
    folder = Path(tempfile.gettempdir()) / f"hypenet-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
    except OSError as error:
        raise UserError(f"{folder}, for tuned kernels, cannot be made ({error.strerror}): set TMPDIR") from error
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise UserError(
            f"{folder}, for tuned kernels, is no folder that you alone can write to: remove it, or set TMPDIR"
        )
    return folder


def cache_variables(folder: Path, gpu: str) -> dict[str, str]:
    """The environment variables that are not set yet: where Triton keeps kernels, and where fla finds configurations.

    Args:
        gpu: the GPU's name, as CUDA gives it.
    """
    found = {}
    if not {"TRITON_CACHE_DIR", "TRITON_HOME"} & os.environ.keys():
        found["TRITON_CACHE_DIR"] = str(folder / "triton")
    measured = MEASURED / gpu_folder(gpu)
    if measured.is_dir() and not {"FLA_CONFIG_DIR", "FLA_CACHE_MODE"} & os.environ.keys():
        found |= {"FLA_CONFIG_DIR": str(measured), "FLA_CACHE_MODE": "strict"}  # another shape is tuned
    return found


def gpu_folder(gpu: str) -> str:
    """A GPU's name as the name of a folder, as fla writes it."""
    return re.sub(r"[^0-9A-Za-z]+", "_", gpu).strip("_")


def take_turns(folder: Path) -> None:
    """Let one process at a time look for what tuning found for a kernel and shape, and tune if there is nothing.

    There is a lock for each kernel and shape. With one lock for all, a rank could wait for it while its holder waits
    for that rank, in a collective between two kernels.
    """
    autotuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    plain = autotuner.check_disk_cache
    if plain.__module__ == __name__:
        return
    locks = folder / "locks"

    def check_disk_cache(self: Any, key: Any, configs: Any, tune: Callable[[], None]) -> Any:
        def timed() -> None:
            began = time.perf_counter()
            tune()
            _seconds.append(time.perf_counter() - began)

        lock = hashlib.sha256(f"{self.base_fn.__module__}.{self.base_fn.__name__} {key}".encode()).hexdigest()
        locks.mkdir(exist_ok=True)
        with exclusive(locks / lock):
            return plain(self, key, configs, timed)

    autotuner.check_disk_cache = check_disk_cache


def report_tuning() -> None:
    """Print one line if kernels were tuned since the last call. Every rank must call this."""
    mine = [sum(_seconds), float(os.environ.get("LOCAL_RANK", "0") == "0")]
    _seconds.clear()
    seconds, machines = all_sum(torch.tensor(mine)).tolist()
    if seconds:
        kept = importlib.import_module("triton").knobs.cache.dir
        say(f"fla's kernels were tuned, once on each machine: {seconds / machines:.0f} s; kept in {kept}")
