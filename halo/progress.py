"""The one progress bar of long work, on rank 0."""

import sys

from tqdm import tqdm

from halo.distributed import rank


def progress_bar(
    total: int | None, name: str, unit: str = "step", initial: int = 0, delay: float = 0.0, scale: bool = False
) -> tqdm:
    """A bar, silent on every rank but 0. In a log it moves twice a minute.

    Args:
        delay: seconds of work before it shows.
        scale: write 1.2M for 1,234,567.
    """
    return tqdm(
        total=total,
        desc=f"{name:>8}",
        unit=unit,
        unit_scale=scale,
        initial=initial,
        delay=delay,
        disable=rank() != 0,
        smoothing=0.1,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
