"""Packing loses no token, whether documents come at once or one by one."""

import numpy as np
import pytest

from halo.data.packing import cut_samples, join_documents, pack_documents

UINT16 = np.dtype(np.uint16)
DOCUMENTS = [[1, 2, 3], [], [4, 5, 6, 7, 8, 9], [10]]
JOINED = [1, 2, 3, 0, 0, 4, 5, 6, 7, 8, 9, 0, 10, 0]


def test_a_separator_follows_each_document() -> None:
    joined = join_documents(DOCUMENTS, 0, UINT16)
    assert joined.tolist() == JOINED
    assert joined.dtype == UINT16
    assert join_documents([], 0, UINT16).tolist() == []


@pytest.mark.parametrize("seq_len", [1, 2, 4, 7, 14, 15])
def test_all_at_once_is_one_by_one(seq_len: int) -> None:
    samples, rest = cut_samples(join_documents(DOCUMENTS, 0, UINT16), seq_len)
    assert samples.shape == (14 // seq_len, seq_len)
    assert [*samples.flatten(), *rest] == JOINED
    packed = [array.tolist() for array in pack_documents(DOCUMENTS, seq_len=seq_len, separator=0, dtype=UINT16)]
    assert packed == [*samples.tolist(), *([rest.tolist()] if len(rest) else [])]
