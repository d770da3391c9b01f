"""Which layers stay attention: the importance score and the selection of the paper's Sec. 4.3.

M^(i) is the teacher with one layer replaced: its layer i is the RNN layer that stage 1 aligned.
"""

from collections.abc import Sequence


def importance(recall: Sequence[float], csr: Sequence[float], epsilon: float = 1e-6) -> list[float]:
    """Eq. 8: s_i = (max R - R_i) / (max C - C_i + epsilon), high if replacing layer i costs much recall and little CSR.

    Args:
        recall: R(M^(i)) in [0, 1] for each layer i.
        csr: C(M^(i)) in [0, 1] for each layer i.
        epsilon: the denominator for the layer with the best CSR. With the paper's 1e-6, any loss of recall at that
            layer outweighs all other layers. If CSR is coarse because it is measured on few questions, an epsilon near
            its resolution avoids this.

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
    """Layer indices by falling score; of equal scores, the lower index first. Eq. 9 keeps the first k."""
    return sorted(range(len(scores)), key=lambda layer: -scores[layer])


def default_k(layers: int) -> int:
    """The number of layers that stay attention: k = floor(L / 4)."""
    return layers // 4
