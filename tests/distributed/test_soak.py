"""A short form of `make soak`."""

from pathlib import Path

from tests.distributed.soak import soak


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    soak(tmp_path, steps=16, kills=6, seed=0)
