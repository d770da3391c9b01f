"""The held-out text: windows within long documents first, then those of short ones joined."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from halo.data.held_out import HeldOut
from halo.errors import UserError
from halo.models.tokenizer import separator_id

DOCUMENTS = ["the town. " * 20, "a letter. " * 5, "the sister. " * 30, "a party. " * 5]


@pytest.fixture
def held_out(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> HeldOut:
    """Every tenth document of a folder of ten times as many."""
    for number in range(10 * len(DOCUMENTS)):
        (tmp_path / f"{number:03}.txt").write_text(DOCUMENTS[number // 10])
    return HeldOut(str(tmp_path), tokenizer)


def test_windows(held_out: HeldOut) -> None:
    ids = [document.tolist() for document in held_out.token_ids()]
    assert len(ids) == len(DOCUMENTS)
    length = len(ids[0])
    assert len(ids[2]) // length == 1 < length / len(ids[1])
    end = separator_id(held_out.tokenizer)
    joined = [*ids[1], end, *ids[3], end]
    for count, within in ((1, 1), (2, 2), (9, 2)):
        windows, found = held_out.windows(length, count)
        expected = [ids[0], ids[2][:length], *([joined[:length]] if count > 2 and len(joined) >= length else [])]
        assert (windows.tolist(), found) == (expected[:count], within)
    by_turns, found = held_out.windows(length // 2, 3)
    assert by_turns.tolist() == [ids[0][: length // 2], ids[2][: length // 2], ids[0][length // 2 :][: length // 2]]
    with pytest.raises(UserError, match="held-out tokens, fewer than one window of 100000"):
        held_out.windows(100_000, 1)
