"""A launcher's command line, read. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halo.config import Config

if TYPE_CHECKING:
    from halo.ranks import RankLayout


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a launcher was asked to do."""

    config: Config
    run: Path
    ds_config: Path
    stages: tuple[str, ...]
    """The stages to run, in order. Those that are finished are left as they are."""
    remembered: str = ""
    """The run's recorded settings that differ from the preset's, in words. Empty: there are none."""
    taken_from: Path | None = None
    """Another run's folder, whose finished `taken_stages` this run takes over (--from)."""
    taken_stages: tuple[str, ...] = ()
    split: "RankLayout | None" = None
    """Which ranks are a dedicated teacher's. None: there are no other ranks."""
