"""The frozen teacher, apart from the student's engine.

It has no gradients, no optimizer state, and enters no checkpoint. It runs forward only. Each rank that holds it holds
the whole, or (sharded) a share: then it has a process group of its own, the ranks of one node; every decoder layer is
cut over them (FSDP2) and gathered just before its forward, over the teacher's own communicator.

What it supplies is its logits, in one of the forms of halo/teacher_logits.py (docs/design.md).
"""

import os
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo.distributed import device, world_size
from halo.errors import UserError
from halo.fuse import fuse
from halo.models import frozen_states
from halo.teacher_logits import LogitsForm, TeacherLogits


class Asked(Protocol):
    """A teacher that answers, wherever it is: `Teacher`, or `halo.dedicated.DedicatedTeacher`."""

    model: PreTrainedModel
    """Its shapes: with weights only where they are here."""
    ranks: int
    """How many ranks hold it and nothing else."""

    def ask(self, input_ids: Tensor) -> Callable[[], TeacherLogits]: ...


class Teacher:
    """A frozen causal language model on this rank.

    Args:
        model: as `halo.build.build_teacher` gives it: whole, or cut over the ranks of `teacher_group`.
        form: in which it supplies its logits.
    """

    ranks = 0

    def __init__(self, model: PreTrainedModel, form: LogitsForm | None = None):
        self.model = model.eval().requires_grad_(False)
        self._form = form or LogitsForm()
        fuse(self.model)

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

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> TeacherLogits:
        """input_ids [B, T] -> the logits of its B x T tokens."""
        hidden = self.hidden_states(input_ids.to(device(), non_blocking=True))
        return self._form.supply(hidden.flatten(0, 1), self.head)

    def ask(self, input_ids: Tensor) -> Callable[[], TeacherLogits]:
        """Begin the forward of [B, T] tokens on the host, in the current stream. Call the result for their logits, in
        a stream that waits for this one."""
        logits = self.logits(input_ids)
        return lambda: used_here(logits)


def used_here(logits: TeacherLogits) -> TeacherLogits:
    """Keep the memory of what another stream made until the current one is done with it."""
    for part in logits.parts:
        if part.is_cuda:
            part.record_stream(torch.cuda.current_stream())
    return logits


def teacher_group(sharded: bool) -> dist.ProcessGroup | None:
    """The ranks that share a teacher with this one, or None: this rank holds a whole one. Every rank must call this."""
    return _node_group() if sharded and world_size() > 1 else None


def _node_group() -> dist.ProcessGroup:
    """A new group of the ranks of this node. Every rank creates every node's group, in the same order."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if world_size() % per_node:
        raise UserError(
            f"a sharded teacher needs the same number of ranks on every node, not {per_node} of {world_size()} here"
        )
    mine, _ = dist.new_subgroups(per_node)
    return mine
