"""A short form of `make soak`."""

from pathlib import Path

from tests.halo.data.soak_preparation import soak


def test_a_preparation_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    soak(tmp_path, kills=3, seed=2)
