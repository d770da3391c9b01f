"""The progress bar of long work, shown by rank 0."""

import sys

from tqdm import tqdm

from halo.distributed import rank


def progress_bar(
    total: int | None, name: str, unit: str = "step", initial: int = 0, delay: float = 0.0, scale: bool = False
) -> tqdm:
    """A bar that rank 0 alone shows. In a log file it prints twice a minute.

    Args:
        total: how many units there are. None: not known.
        delay: seconds before the bar appears.
        scale: print 1.2M for 1,234,567.
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
