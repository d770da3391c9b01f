"""Which ranks are a dedicated teacher's, and which splits are refused."""

from typing import Any

import pytest
import torch.distributed as dist

from halo.config import Distill
from halo.errors import UserError
from halo.ranks import RankLayout, split_ranks
from tests.distributed.jobs import training


def dedicated(teachers: int, **changes: Any) -> Distill:
    return training(teacher_placement="dedicated", teacher_ranks=teachers, **changes)


def split(rank: int, size: int, settings: Distill | None) -> RankLayout:
    return split_ranks(dist.HashStore(), rank, size, settings)


@pytest.fixture
def of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of four ranks."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")


@pytest.mark.usefixtures("of_four")
def test_the_last_ranks_of_each_node_are_the_teachers_and_answer_students_of_their_node():
    ranks = [split(rank, 8, dedicated(1)) for rank in range(8)]
    assert [rank for rank in range(8) if ranks[rank].is_teacher] == [3, 7]
    assert ranks[3].answered_students() == [0, 1, 2]
    assert ranks[7].answered_students() == [3, 4, 5]
    assert ranks[0].all_teachers == 2
    assert [split(rank, 4, dedicated(2)).answered_students() for rank in (2, 3)] == [[0], [1]]


@pytest.mark.usefixtures("of_four")
def test_without_a_dedicated_teacher_all_are_students():
    for settings in (None, training()):
        assert not any(split(rank, 6, settings).is_teacher for rank in range(6))


@pytest.mark.parametrize(
    ("per_node", "size", "settings", "message"),
    [
        (1, 1, dedicated(1), "teacher_ranks = 1 leaves no student among the 1 ranks of a node: start more ranks"),
        (4, 4, dedicated(4), "teacher_ranks = 4 leaves no student among the 4 ranks"),
        (4, 4, dedicated(3), "teacher_ranks = 3 is more than the 1 students .*: use at most 2"),
        (4, 6, dedicated(1), "the same number of ranks on every node, not 4 of 6 here"),
        (8, 8, dedicated(3, teacher_sharded=True), r"the 5 of a node: set distill\.teacher_ranks = (2|4)"),
        (5, 5, dedicated(2, teacher_sharded=True), r"the 3 of a node: set distill\.teacher_sharded = false"),
    ],
)
def test_ranks_that_cannot_be_split(monkeypatch, per_node, size, settings, message):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))
    with pytest.raises(UserError, match=message) as error:
        split(0, size, settings)
    assert "\n" not in str(error.value)
