"""The teacher is asked one micro-batch ahead, and what was asked does not count as seen."""

from contextlib import nullcontext
from typing import Any

import torch

from halo.training.look_ahead import LookAhead


class Counting:
    """A stream of 0, 1, 2, ..."""

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


def test_answers_belong_to_their_tokens_and_are_asked_for_ahead():
    said: list[str] = []

    def ask(input_ids: torch.Tensor):
        number = int(input_ids[0, 0])
        said.append(f"asked {number}")

        def answer() -> dict[str, Any]:
            said.append(f"answered {number}")
            return {"teacher": number}

        return answer

    ahead, untimed = LookAhead(Counting(), ask), Untimed()
    for number in range(3):
        taken = ahead.take(untimed)
        assert taken["input_ids"].tolist() == [[number, number]]
        assert taken["teacher"] == number
        if number < 2:
            ahead.ask(untimed)
    assert said == [f"{what} {number}" for number in range(3) for what in ("asked", "answered")]


def test_the_position_is_that_before_what_was_asked_ahead():
    stream, untimed = Counting(), Untimed()
    ahead = LookAhead(stream, lambda input_ids: dict)
    assert ahead.position() == {"drawn": 0}
    ahead.take(untimed)
    assert ahead.position() == {"drawn": 1}
    ahead.ask(untimed)
    assert (ahead.position(), stream.drawn) == ({"drawn": 1}, 2)
    ahead.take(untimed)
    assert ahead.position() == {"drawn": 2}
