"""The frozen teacher, apart from the student's engine.

It has no gradients, no optimizer state, and enters no checkpoint. It runs forward only. `replicated`: each rank holds a
whole teacher. `sharded`: it has a process group of its own, the ranks of one node; every decoder layer is cut over them
(FSDP2) and gathered just before its forward, over the teacher's own communicator.

What it supplies is its logits, in factored form: final hidden states and the frozen head (docs/design.md).
"""

import os
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from halo.distributed import device, world_size
from halo.errors import UserError
from halo.fuse import fuse
from halo.models import frozen_states


@dataclass(frozen=True)
class FactoredLogits:
    """Logits as `hidden @ head.T`: [N, E] final hidden states and the [V, E] head, both without gradient."""

    hidden: Tensor
    head: Tensor


class Teacher:
    """A frozen causal language model.

    Args:
        model: the whole model, on any device, or as `halo.build` makes it, which has placed it.
        placement: `replicated` or `sharded`. One rank alone always holds a whole teacher.
    """

    def __init__(self, model: PreTrainedModel, placement: Literal["replicated", "sharded"] = "replicated"):
        self.model = model.eval().requires_grad_(False)
        fuse(self.model)
        if not isinstance(self.layers[0], FSDPModule) and (group := teacher_group(placement)) is not None:
            mesh = DeviceMesh.from_group(group, device().type)
            for layer in self.layers:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        self.model.to(device())

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.layers

    @property
    def head(self) -> Tensor:
        """[V, E]."""
        return self.model.lm_head.weight

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> final hidden states [B, T, E], after the last norm."""
        return frozen_states(self.model, input_ids)

    def logits(self, input_ids: Tensor) -> FactoredLogits:
        """input_ids [B, T] -> factored logits of its B x T tokens."""
        return FactoredLogits(self.hidden_states(input_ids).flatten(0, 1), self.head)


def teacher_group(placement: Literal["replicated", "sharded"]) -> dist.ProcessGroup | None:
    """The ranks that share a teacher with this one, or None: this rank holds a whole one. Every rank must call this."""
    return _node_group() if placement == "sharded" and world_size() > 1 else None


def _node_group() -> dist.ProcessGroup:
    """A new group of the ranks of this node. Every rank creates every node's group, in the same order."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if world_size() % per_node:
        raise UserError(
            f"a sharded teacher needs the same number of ranks on every node, not {per_node} of {world_size()} here"
        )
    mine, _ = dist.new_subgroups(per_node)
    return mine
