"""The frozen teacher, apart from the student's engine.

It has no gradients, no optimizer state, and enters no checkpoint. It runs forward only. Each rank that holds it holds
the whole, or (sharded) a share: then it has a process group of its own, the ranks of one node; every decoder layer is
cut over them (FSDP2) and gathered just before its forward, over the teacher's own communicator.

What it supplies is its logits, in one of the forms of halo/teacher/logits.py (docs/design.md).
"""

import os
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from halo.distributed import device, world_size
from halo.errors import UserError
from halo.models.loading import frozen_states, never_looks
from halo.parallel.prepare import prepare_model
from halo.parallel.sequence import SequenceGroup
from halo.teacher.logits import LogitsForm, TeacherLogits


class Asked(Protocol):
    """A teacher that answers, wherever it is: `Teacher`, or `halo.teacher.dedicated.DedicatedTeacher`."""

    model: PreTrainedModel
    """Its shapes: with weights only where they are here."""
    ranks: int
    """How many ranks hold it and nothing else."""

    def ask(self, input_ids: Tensor) -> Callable[[], TeacherLogits]: ...


class Teacher:
    """A frozen causal language model on this rank.

    Args:
        model: as `halo.models.build.build_teacher` gives it: whole, or cut over the ranks of `teacher_group`.
        form: in which it supplies its logits.
        sequence: the ranks that share each sequence with this one: it answers for this rank's chunk. None: there are
            none. A group `apart`, where it works beside a student.
    """

    ranks = 0

    def __init__(self, model: PreTrainedModel, form: LogitsForm | None = None, sequence: SequenceGroup | None = None):
        self.model = model.eval().requires_grad_(False)
        self._form = form or LogitsForm()
        self.sequence = sequence or SequenceGroup()
        self._recorded: dict[torch.Size, _Recording] = {}
        prepare_model(self.model, fused=True, sequence=self.sequence)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.layers

    @property
    def head(self) -> Tensor:
        """[V, E]."""
        return self.model.lm_head.weight

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> final hidden states after the last norm, [B, T, E], or [B, C, E] of this rank's chunk."""
        rows = self.sequence.begin(input_ids)
        return frozen_states(self.model, rows.of_chunk(input_ids), rows.first)

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> TeacherLogits:
        """input_ids [B, T] -> the logits of its B x T tokens, or of this rank's chunk of them."""
        input_ids = input_ids.to(device(), non_blocking=True)
        if self._can_be_recorded(input_ids):
            if input_ids.shape not in self._recorded:
                self._recorded[input_ids.shape] = _Recording(self.hidden_states, input_ids)
            hidden = self._recorded[input_ids.shape](input_ids)
        else:
            hidden = self.hidden_states(input_ids)
        return self._form.supply(hidden.flatten(0, 1), self.head)

    def _can_be_recorded(self, input_ids: Tensor) -> bool:
        """Not where the forward waits for the host, nor where it exchanges weights with other ranks."""
        cut = isinstance(self.layers[0], FSDPModule)
        cut = cut or self.sequence.degree > 1
        return input_ids.is_cuda and not cut and never_looks(self.model, input_ids.shape[1])

    def ask(self, input_ids: Tensor) -> Callable[[], TeacherLogits]:
        """Begin the forward of [B, T] tokens on the host, in the current stream. Call the result for their logits, in
        a stream that waits for this one."""
        logits = self.logits(input_ids)
        return lambda: used_here(logits)


class _Recording:
    """A forward of one shape as a CUDA graph. The host issues it in one call, and is free for the student's work."""

    def __init__(self, forward: Callable[[Tensor], Tensor], input_ids: Tensor):
        self._input_ids = input_ids.clone()
        forward(self._input_ids)  # what is compiled or chosen at the first call, before it is recorded
        self._graph = torch.cuda.CUDAGraph()
        # Only this thread's calls matter: those of NCCL's watchdog may go on.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._hidden = forward(self._input_ids)

    def __call__(self, input_ids: Tensor) -> Tensor:
        self._input_ids.copy_(input_ids)
        self._graph.replay()
        return self._hidden.clone()  # the next replay writes into the same memory


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
