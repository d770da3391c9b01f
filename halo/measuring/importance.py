"""Which layers stay attention: the importance score and the choice of the paper's Sec. 4.3.

Scores come from one-layer replacements: M^(i) is the teacher whose layer i is the RNN layer that stage 1 aligned.
"""

from collections.abc import Sequence


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
