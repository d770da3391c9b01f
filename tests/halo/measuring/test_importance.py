"""Eq. 8 and 9 against numbers worked by hand, and the published rankings against the paper's counts."""

import pytest

from halo.measuring.importance import default_k, importance, ranking


def test_importance_by_hand() -> None:
    scores = importance([0.5, 0.9, 1.0], [0.4, 0.7, 0.5], epsilon=0.1)
    # max R = 1.0 and max C = 0.7: denominators 0.3 + 0.1, 0 + 0.1, 0.2 + 0.1.
    assert scores == pytest.approx([0.5 / 0.4, 0.1 / 0.1, 0.0 / 0.3])


def test_best_csr_layer_divides_by_epsilon_alone() -> None:
    scores = importance([0.0, 0.5, 1.0], [0.2, 0.6, 0.4])
    assert scores == pytest.approx([1.0 / (0.4 + 1e-6), 0.5 / 1e-6, 0.0])
    assert ranking(scores) == [1, 0, 2]


def test_layer_with_best_recall_and_best_csr_is_least_important() -> None:
    assert importance([1.0, 0.4], [0.9, 0.3]) == pytest.approx([0.0, 0.6 / (0.6 + 1e-6)])


def test_all_layers_alike_score_zero() -> None:
    assert importance([0.7] * 4, [0.5] * 4) == [0.0] * 4


def test_ties_go_to_the_lower_index() -> None:
    scores = [1.0, 3.0, 2.0, 3.0, 1.0, 2.0, 0.0, 3.0]
    assert ranking(scores) == [1, 3, 7, 2, 5, 0, 4, 6]


@pytest.mark.parametrize(("layers", "k"), [(4, 1), (8, 2), (28, 7), (35, 8), (36, 9)])
def test_a_quarter_of_the_layers_stays_attention(layers: int, k: int) -> None:
    assert default_k(layers) == k


@pytest.mark.parametrize(
    ("recall", "csr", "epsilon", "message"),
    [
        ([], [], 1e-6, "one recall and one CSR"),
        ([0.1, 0.2], [0.1], 1e-6, "one recall and one CSR"),
        ([0.1, 1.2], [0.1, 0.2], 1e-6, "between 0 and 1"),
        ([0.1, 0.2], [0.1, float("nan")], 1e-6, "between 0 and 1"),
        ([0.1, 0.2], [0.1, 0.2], 0.0, "epsilon must be positive"),
    ],
)
def test_bad_scores(recall: list[float], csr: list[float], epsilon: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance(recall, csr, epsilon)
