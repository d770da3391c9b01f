"""Batches are prefetched one ahead, each gets its own logits, and a prefetched one does not count as seen."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from halo.teacher.batch import Batch
from halo.teacher.logits import FullLogits, TeacherLogits
from halo.training.look_ahead import LookAhead
from hypenet.losses import IGNORE


class Counting:
    """A stream of batches full of 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.drawn = 0

    def __next__(self) -> torch.Tensor:
        self.drawn += 1
        return torch.full((1, 2), self.drawn - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}


class Untimed:
    def waiting(self, what: str):
        return nullcontext()


class Counted:
    """A teacher whose logits are the batch's number."""

    ranks = 0

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.numbers: list[int] = []

    def prefetch(self, batch: Batch) -> None:
        self.numbers.append(int(batch.host_ids[0, 0]))
        self.calls.append(f"prefetch {self.numbers[-1]}")

    def next(self) -> TeacherLogits:
        number = self.numbers.pop()
        self.calls.append(f"next {number}")
        return FullLogits(torch.full((1, 1), float(number)))


def test_each_batch_gets_its_own_logits_which_are_prefetched():
    teacher = Counted()
    batches = LookAhead(Counting(), Untimed(), teacher)
    for number in range(3):
        batch = next(batches)
        assert batch.input_ids.tolist() == batch.host_ids.tolist() == [[number, number]]
        assert batch.teacher_logits.values.item() == number
        if number < 2:
            batches.prefetch()
    assert teacher.calls == [f"{what} {number}" for number in range(3) for what in ("prefetch", "next")]


def test_without_a_teacher_there_are_no_logits():
    assert next(LookAhead(Counting(), Untimed())).teacher_logits is None


def test_the_position_is_that_before_the_prefetched_batch():
    stream = Counting()
    batches = LookAhead(stream, Untimed())
    assert batches.position() == {"drawn": 0}
    next(batches)
    assert batches.position() == {"drawn": 1}
    batches.prefetch()
    assert (batches.position(), stream.drawn) == ({"drawn": 1}, 2)
    next(batches)
    assert batches.position() == {"drawn": 2}


@pytest.mark.parametrize(
    ("separator", "bounds", "labels"),
    [
        (None, None, [[1, 9, 2, IGNORE], [3, 4, 5, IGNORE]]),
        (9, [0, 3, 4, 5, 8], [[1, 9, IGNORE, IGNORE], [IGNORE, 4, 5, IGNORE]]),
    ],
    ids=["documents that see each other", "isolated documents"],
)
def test_the_labels_are_the_next_tokens_of_the_same_document(separator, bounds, labels):
    batch = Batch.on_host(torch.tensor([[0, 1, 9, 2], [9, 3, 4, 5]]), separator)
    assert batch.labels.tolist() == labels
    assert (None if batch.document_bounds is None else batch.document_bounds.tolist()) == bounds
