"""The frozen teacher beside the student on the same ranks, outside of the student's engine.

It runs forward only: it has no gradients and no optimizer state, and no checkpoint holds it. A rank holds the whole
teacher or, if it is sharded, a part. Then the ranks of a node are a process group: every decoder layer is cut over them
(FSDP2), and gathered while the layer before it computes, over a communicator that only the teacher uses.

It supplies its logits in one of the forms of halo/teacher/logits.py (docs/design.md).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from halo.distributed import world_size
from halo.errors import UserError
from halo.models.attention_functions import use_attention
from halo.models.build import build_teacher
from halo.models.loading import frozen_states, never_looks
from halo.parallel.prepare import prepare_model
from halo.parallel.sequence import SequenceGroup
from halo.teacher.batch import Batch, keep_for_current_stream
from halo.teacher.fp8 import to_fp8
from halo.teacher.logits import LogitsForm, TeacherLogits
from hypenet.kernels import plain_only


class TeacherSource(Protocol):
    """Supplies a teacher's logits, one micro-batch after the other: `Teacher`, or `DedicatedTeacher` on other ranks."""

    model: PreTrainedModel
    """The teacher's shapes; its weights only where this rank holds them."""
    ranks: int
    """How many ranks hold the teacher and nothing else."""

    def prefetch(self, batch: Batch) -> None:
        """Begin to make the logits of a micro-batch, in the current stream. Nothing waits for them."""

    def next(self) -> TeacherLogits:
        """The logits of the micro-batch that was prefetched, for the current stream. Call it before the next prefetch.

        If another stream makes them, the current one must wait for it first.
        """


class Teacher:
    """A frozen causal language model on this rank.

    Args:
        model: from `teacher_model`: whole, or cut over the ranks of `teacher_group`.
        form: the form of its logits.
        sequence: the ranks that share each sequence with this one; the logits are those of this rank's chunk. None:
            sequences are not shared. Beside a student, it must be a group `apart`.
    """

    ranks = 0

    def __init__(self, model: PreTrainedModel, form: LogitsForm | None = None, sequence: SequenceGroup | None = None):
        self.model = model.eval().requires_grad_(False)
        self._form = form or LogitsForm()
        self.sequence = sequence or SequenceGroup()
        self._recorded: dict[torch.Size, _Recording] = {}
        self._prefetched: TeacherLogits | None = None
        prepare_model(self.model, fused=True, sequence=self.sequence)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.layers

    @property
    def head(self) -> Tensor:
        """[V, E]."""
        return self.model.lm_head.weight

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> the hidden states after the last norm, [B, T, E], or [B, C, E] of this rank's chunk."""
        rows = self.sequence.begin(input_ids)
        return frozen_states(self.model, rows.of_chunk(input_ids), rows.first)

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> TeacherLogits:
        """input_ids [B, T] on this rank's device -> the logits of its B x T tokens, or of this rank's chunk of them."""
        if self._can_be_recorded(input_ids):
            if input_ids.shape not in self._recorded:
                self._recorded[input_ids.shape] = _Recording(self.hidden_states, input_ids)
            hidden = self._recorded[input_ids.shape](input_ids)
        else:
            hidden = self.hidden_states(input_ids)
        return self._form.supply(hidden.flatten(0, 1), self.head)

    def _can_be_recorded(self, input_ids: Tensor) -> bool:
        """Not if the forward waits for the host, nor if it communicates with other ranks."""
        asked = input_ids.is_cuda and not plain_only()
        return asked and not self.communicates() and never_looks(self.model, input_ids.shape[1])

    def communicates(self) -> bool:
        """Whether a forward exchanges something with other ranks."""
        return isinstance(self.layers[0], FSDPModule) or self.sequence.degree > 1

    def prefetch(self, batch: Batch) -> None:
        """As `TeacherSource` has it."""
        assert self._prefetched is None, "one micro-batch at a time"
        self._prefetched = self.logits(batch.input_ids)

    def next(self) -> TeacherLogits:
        """As `TeacherSource` has it."""
        assert self._prefetched is not None, "nothing was prefetched"
        logits, self._prefetched = self._prefetched, None
        keep_for_current_stream(logits.parts)
        return logits


class _Recording:
    """A forward of one shape as a CUDA graph. The host launches it in one call, and is free for the student's work."""

    def __init__(self, forward: Callable[[Tensor], Tensor], input_ids: Tensor):
        self._input_ids = input_ids.clone()
        forward(self._input_ids)  # a first call compiles and tunes kernels, which cannot be recorded
        self._graph = torch.cuda.CUDAGraph()
        # Thread-local: NCCL's watchdog thread may make CUDA calls meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._hidden = forward(self._input_ids)

    def __call__(self, input_ids: Tensor) -> Tensor:
        self._input_ids.copy_(input_ids)
        self._graph.replay()
        return self._hidden.clone()  # the next replay writes into the same memory


def teacher_model(source: Path, *, sharded: bool, fp8: bool, attention: str) -> PreTrainedModel:
    """The teacher's weights on this rank, for `Teacher`. Every rank that holds it must call this.

    Args:
        source: a folder or a GGUF file.
        sharded: cut over the ranks of `teacher_group`.
        fp8: its decoder layers multiply in FP8 (halo/teacher/fp8.py); not if it is sharded.
        attention: the implementation of its attention (halo/models/attention.py).

    Raises:
        UserError: it could not be loaded.
    """
    model = build_teacher(source, teacher_group(sharded), to_fp8 if fp8 else None)
    return use_attention(model, attention)


def teacher_group(sharded: bool) -> dist.ProcessGroup | None:
    """The ranks that share a teacher with this one. None: this rank holds a whole one. Every rank must call this.

    Raises:
        UserError: the nodes have different numbers of ranks.
    """
    return _node_group() if sharded and world_size() > 1 else None


def _node_group() -> dist.ProcessGroup:
    """A new group of the ranks of this node."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if world_size() % per_node:
        raise UserError(
            f"a sharded teacher needs the same number of ranks on every node, not {per_node} of {world_size()} here"
        )
    group, _ = dist.new_subgroups(per_node)  # every rank creates every node's group, in the same order
    return group
