"""What a stage runs on and with: GPUs and links, ZeRO's settings, the stage's own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from halo.config import Training
from halo.errors import UserError
from halo.plan.assumptions import (
    BANDWIDTH,
    DISPATCH,
    FLASH_ATTENTION,
    KERNELS,
    LINK,
    NETWORK,
    PRODUCTS,
    REACHED,
)
from halo.plan.dry_run import Work
from halo.training.engine import SINGLE_RANK_ZERO
from halo.training.gathering import AUTO, LIVE, PREFETCH, REUSE
from halo.training.gpus import GPU


@dataclass(frozen=True, kw_only=True)
class Cluster:
    gpu: GPU
    nodes: int = 1
    gpus_per_node: int = 8

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def without(self, ranks: int) -> "Cluster":
        """The cluster without the ranks of each node that hold a dedicated teacher.

        Raises:
            UserError: no rank is left.
        """
        if ranks >= self.gpus_per_node:
            raise UserError(f"{ranks} ranks of the teacher leave no student among the {self.gpus_per_node} of a node")
        return replace(self, gpus_per_node=self.gpus_per_node - ranks)

    def exchange(self, size: float) -> float:
        """Seconds of an all-gather or a reduce-scatter of `size` bytes over all ranks."""
        network = self.gpus_per_node * self.gpu.network * NETWORK
        across = size * (self.nodes - 1) / self.nodes / network
        within = size * (self.ranks - 1) / self.ranks / (self.gpu.link * LINK) if self.gpus_per_node > 1 else 0.0
        return max(across, within)

    def gather_in_node(self, size: float) -> float:
        """Seconds of an all-gather of `size` bytes over the ranks of a node."""
        return size * (self.gpus_per_node - 1) / self.gpus_per_node / (self.gpu.link * LINK)

    def seconds(self, work: Work, *, recorded: bool = False) -> float:
        """Seconds of work on a GPU: for each operation the longer of computing and moving; at least the host's time.

        Args:
            recorded: whether the host launches it as one CUDA graph.
        """
        products = (self.gpu.reached or self.gpu.peak * REACHED) * PRODUCTS
        rates = {"product": products, "attention": self.gpu.peak * FLASH_ATTENTION}
        shares = {"other": BANDWIDTH}
        device = sum(
            max(op.flops / rates.get(op.kind, products), op.moved / (self.gpu.bandwidth * shares.get(op.kind, KERNELS)))
            for op in work.operations
        )
        return device if recorded else max(device, work.dispatched * DISPATCH)


@dataclass(frozen=True, kw_only=True)
class Zero:
    """DeepSpeed's settings for memory and communication. Sizes are numbers of elements."""

    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_bucket: int = 500_000_000
    overlap: bool = False
    contiguous: bool = True
    """Whether memory for all gradients is allocated at the first one, to copy them there (ZeRO-1 and 2)."""
    prefetch: int | None = 50_000_000
    max_live: int | None = 1_000_000_000
    max_reuse: int | None = 1_000_000_000
    """None, as for the two above: by the model (halo/training/gathering.py)."""
    sub_group: int = 1_000_000_000

    @classmethod
    def read(cls, ds_config: Mapping[str, Any], ranks: int) -> "Zero":
        """The settings with which `ranks` ranks run a DeepSpeed configuration, with DeepSpeed's own defaults.

        Raises:
            UserError: the ZeRO stage is not 1, 2 or 3.
        """
        zero = ds_config.get("zero_optimization", {}) | (SINGLE_RANK_ZERO if ranks == 1 else {})
        by_model = {key for key in (PREFETCH, LIVE, REUSE) if zero.get(key) == AUTO}
        zero = {key: value for key, value in zero.items() if value != AUTO}  # for all else DeepSpeed has its default
        stage = zero.get("stage")
        if stage not in (1, 2, 3):
            raise UserError("the DeepSpeed config has no zero_optimization with stage 1, 2 or 3: set one")

        def offloads(what: str) -> bool:
            return (zero.get(what) or {}).get("device", "none") != "none"

        def ahead(key: str, default: Any) -> int | None:
            return None if key in by_model else int(zero.get(key, default))

        return cls(
            stage=stage,
            offload_optimizer=offloads("offload_optimizer"),
            offload_parameters=offloads("offload_param"),
            reduce_bucket=int(zero.get("reduce_bucket_size", cls.reduce_bucket)),
            overlap=bool(zero.get("overlap_comm", stage == 3)),
            contiguous=bool(zero.get("contiguous_gradients", True)) or stage == 3 or offloads("offload_optimizer"),
            prefetch=ahead(PREFETCH, cls.prefetch),
            max_live=ahead(LIVE, cls.max_live),
            max_reuse=ahead(REUSE, cls.max_reuse),
            sub_group=int(zero.get("sub_group_size", cls.sub_group)),
        )


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The settings of a stage."""

    training: Training
    cluster: Cluster
    zero: Zero
