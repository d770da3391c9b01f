"""Which layers stay attention: the importance score and the choice of the paper's Sec. 4.3.

Scores come from one-layer replacements: M^(i) is the teacher whose layer i is the RNN layer that stage 1 aligned.
"""

from collections.abc import Sequence

# fmt: off
PUBLISHED_LAYERS: dict[str, tuple[int, ...]] = {
    "Qwen3-1.7B": (
        3, 21, 2, 9, 25, 6, 8, 19, 16, 24, 12, 26, 23, 11, 27, 14, 18, 4, 7, 17, 13, 15, 20, 10, 22, 1, 0, 5,
    ),
    "Qwen3-4B": (
        0, 7, 1, 33, 24, 15, 34, 22, 14, 31, 5, 21, 23, 16, 20, 2, 18, 19, 32, 27, 13, 25, 30, 6, 29, 17, 11, 35, 8,
        12, 9, 10, 26, 28, 4, 3,
    ),
    "Qwen3-8B": (
        10, 6, 7, 24, 33, 2, 4, 1, 34, 22, 13, 26, 35, 20, 31, 15, 9, 29, 14, 5, 3, 17, 23, 28, 30, 21, 25, 18, 8,
        11, 32, 12, 0, 19, 27, 16,
    ),
}
# fmt: on
"""Table 7's HALO rows: every layer of a teacher (0-based), most important first."""


def importance(recall: Sequence[float], csr: Sequence[float], epsilon: float = 1e-6) -> list[float]:
    """Eq. 8: s_i = (max R - R_i) / (max C - C_i + epsilon), high where recall drops much and CSR little.

    Args:
        recall: R(M^(i)) in [0, 1], one a layer.
        csr: C(M^(i)) in [0, 1], one a layer.
        epsilon: what a layer with the best CSR divides by. The paper's 1e-6 lets any loss of recall at such a layer
            outweigh every other layer; where few questions make CSR coarse, one near its resolution keeps such a layer
            from deciding alone.

    Raises:
        ValueError: no layers, lists of unequal length, a value outside [0, 1], or an epsilon that is not positive.
    """
    if len(recall) != len(csr) or not recall:
        raise ValueError(f"importance needs one recall and one CSR a layer, not {len(recall)} and {len(csr)}")
    if not all(0 <= value <= 1 for value in (*recall, *csr)):
        raise ValueError("recall and CSR must lie between 0 and 1")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, not {epsilon}")
    best_recall, best_csr = max(recall), max(csr)
    return [(best_recall - r) / (best_csr - c + epsilon) for r, c in zip(recall, csr, strict=True)]


def ranking(scores: Sequence[float]) -> list[int]:
    """Layer indices, most important first, the lower index first of equals. Eq. 9 keeps the first k."""
    return sorted(range(len(scores)), key=lambda layer: -scores[layer])


def default_k(layers: int) -> int:
    """How many of a model's layers stay attention: k = floor(L / 4)."""
    return layers // 4
