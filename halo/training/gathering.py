"""How far ahead ZeRO-3 gathers, where a DeepSpeed JSON leaves it to the model ("auto"): one layer.

While a layer computes, the next one is on its way, forward and backward. DeepSpeed 0.19 does this from the second
micro-batch on, once it has recorded the order of the modules, if three of its settings fit the model:

    stage3_prefetch_bucket_size   it gathers ahead until so many elements are on their way. So many that only a whole
                                  layer is enough, and no more: what belongs to the layer after it would keep the buffer
                                  of both.
    stage3_max_live_parameters    it gathers nothing ahead if more than these are whole: those that stay whole until the
                                  step, and two layers.
    stage3_max_reuse_distance     it keeps a layer from forward to backward if fewer elements are used in between: the
                                  last layer. More of them would leave no room for the next one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

AUTO = "auto"
PREFETCH, LIVE, REUSE = "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"
PERSISTENT = 100_000
"""DeepSpeed's default for `stage3_param_persistence_threshold`: parameters that are no larger are always whole."""


def live_parameters(largest: int, external: int) -> int:
    """Elements that are whole at a time: `external` ones until the step, a layer of `largest`, and the next."""
    return external + 2 * largest


def fill_gathering(zero: Mapping[str, Any], layers: Sequence[Sequence[int]], external: int) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`, where the settings above that are "auto" have become numbers.

    Args:
        layers: the sizes of each layer's parameters, in their order.
        external: elements that a module reads but does not own: they are whole until the step. In stage 1 these are
            the layers themselves.
    """
    threshold = zero.get("stage3_param_persistence_threshold", AUTO)
    threshold = PERSISTENT if threshold == AUTO else int(threshold)
    partitioned = [[size for size in sizes if size > threshold] or [0] for sizes in layers]
    whole = [sum(sizes) for sizes in layers]
    values = {
        PREFETCH: 1 + max(sum(sizes[:-1]) for sizes in partitioned),
        LIVE: live_parameters(max(whole), external),
        # In stage 1 backward needs no weights: they must not be gathered again. A forward counts them twice, for the
        # regression and the mixer in it, and so does backward.
        REUSE: 1 if external < sum(whole) else 4 * external,
    }
    return dict(zero) | {key: value for key, value in values.items() if zero.get(key) == AUTO}
