"""What every launcher does: read the command line, join the ranks, run, and end all ranks together.

    launch(job, description="...")   # job(Job)

Works under `deepspeed`, torchrun, srun with torchrun, and as a plain `python launcher/x.py`.
"""

import argparse
import contextlib
import os
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from halo.config import Config, load_config
from halo.errors import EXIT_USER_ERROR, Stopped, UserError
from halo.graph import stages_to
from halo.ranks import ERRORS, LEFT, Split, split_ranks
from halo.teacher.dedicated import serve

EXIT_SAVED = 75
"""Asked to stop by a signal, and saved: the same command goes on."""
RENDEZVOUS = timedelta(minutes=30)
"""How long a rank waits for all others to start."""
DS_CONFIG = Path(__file__).parent.parent / "ds_configs" / "zero1.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command line, read."""

    config: Config
    run: Path
    ds_config: Path
    prepare: bool
    """Whether to run the stages before this one where they are missing."""
    taken_from: Path | None = None
    """Another run's folder, to take finished stages from (halo/taking.py)."""
    taken_stages: tuple[str, ...] = ()
    split: Split | None = None
    """Which ranks are a dedicated teacher's. None: there are no other ranks."""


def launch(
    job: Callable[[Job], object], *, description: str, stage: str | None = None, prepare: bool | None = None
) -> None:
    """Parse, join the ranks, run `job`, leave. Ranks of a dedicated teacher serve it instead.

    A UserError ends every rank: the first rank to meet it prints one line, and each exits with status 2. Stopped ends
    every rank too, with status 75: all raise it, at one step.

    Args:
        stage: the stage of a conversion that the job runs, if any, or the last one.
        prepare: in the place of what the command line says.
    """
    arguments, overrides = _parser(description).parse_known_args()
    _fill_environment()
    warnings.filterwarnings("ignore", category=FutureWarning)
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=RENDEZVOUS)))
    status = 0
    try:
        preset = arguments.preset or "tiny"
        run = Path(arguments.run or Path("runs") / load_config(preset, overrides).name)
        config = load_config(preset, overrides, recorded=run / "config.toml")
        if prepare is None:
            prepare = arguments.prepare or arguments.preset is None
        distills = stage is not None and "distill" in stages_to(stage, prepare)
        split = split_ranks(store, rank, world_size, config.distill if distills else None)
        split.join()
        if split.is_teacher:
            serve(split)
        else:
            job(Job(config=config, run=run, ds_config=Path(arguments.ds_config), prepare=prepare, split=split))
    except UserError as error:
        if store.add(ERRORS, 1) == 1:
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(store, rank, world_size)
    except Stopped as stopped:
        status = EXIT_SAVED
        if rank == 0:
            print(f"{stopped}: the same command goes on from there", flush=True)
    dist.destroy_process_group()
    if split.is_teacher:
        split.leave()
    else:
        split.dismiss(status)
    if status:
        sys.exit(status)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Any setting of the preset can be overridden: --distill.lr 5e-5",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset", help="a shipped preset or the path of a TOML file (default: tiny, the embedded one)"
    )
    parser.add_argument("--run", help="the run's folder (default: runs/<preset>)")
    parser.add_argument("--ds_config", default=str(DS_CONFIG), help="DeepSpeed JSON (default: %(default)s)")
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="first run the stages before this one where they are missing (always so without --preset)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


def _fill_environment() -> None:
    """What launchers leave out: a plain python sets nothing, DeepSpeed sets LOCAL_SIZE for LOCAL_WORLD_SIZE."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if "LOCAL_WORLD_SIZE" not in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])


def _leave(store: dist.Store, rank: int, world_size: int) -> NoReturn:
    """End this rank. Rank 0 may hold the store: it stays a moment, so that the others learn what is already printed."""
    if rank != 0:
        store.set(f"{LEFT}/{rank}", "")
    elif world_size > 1:
        with contextlib.suppress(dist.DistError):
            store.wait([f"{LEFT}/{r}" for r in range(1, world_size)], timedelta(seconds=5))
    # Not sys.exit: a rank must not wait in an exit handler for a collective that will never come.
    os._exit(EXIT_USER_ERROR)
