"""A micro-batch: its tokens on the host and on the device, what follows from them, and what the teacher supplies.

Shapes: B sequences, T tokens of each.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from halo.accelerator import on_gpu
from halo.teacher.logits import TeacherLogits
from hypenet.losses import IGNORE


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch. It is made on the host, and `to` copies it to the device once.

    Attributes:
        host_ids: [B, T] int64 tokens, on the host; in pinned memory where there is a GPU.
        input_ids: the same on the device.
        labels: [B, T] int64 on the device, the `next_tokens`.
        document_bounds: [documents + 1] int32 on the host, as the function `document_bounds` gives them. None: each
            sequence is one document.
        teacher_logits: of these tokens, or of this rank's chunk of them. None: the loss needs none.
    """

    host_ids: Tensor
    input_ids: Tensor
    labels: Tensor
    document_bounds: Tensor | None = None
    teacher_logits: TeacherLogits | None = None

    @classmethod
    def on_host(cls, tokens: Tensor, separator: int | None = None) -> "Batch":
        """A batch of [B, T] int64 tokens, before it is copied to the device.

        Args:
            separator: the token that ends a document, where documents are isolated. None: they are not.
        """
        bounds = None if separator is None else document_bounds(tokens, separator)
        ids, labels = _pinned(tokens), _pinned(next_tokens(tokens, bounds))
        return cls(host_ids=ids, input_ids=ids, labels=labels, document_bounds=bounds)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, copied in the current stream; the host does not wait."""
        return replace(
            self,
            input_ids=self.host_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )

    def keep_for_current_stream(self) -> None:
        """`keep_for_current_stream`, of what is on the device."""
        keep_for_current_stream((self.input_ids, self.labels))


def keep_for_current_stream(tensors: Iterable[Tensor]) -> None:
    """Keep the memory of tensors that another stream made until the current one is done with them."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream())


def next_tokens(input_ids: Tensor, document_bounds: Tensor | None = None) -> Tensor:
    """[B, T] -> [B, T]: the token after each; IGNORE at the end of a sequence, and of each document if isolated."""
    labels = F.pad(input_ids[:, 1:], (0, 1), value=IGNORE)
    if document_bounds is not None:
        last = document_bounds[1:].long() - 1
        labels = labels.flatten().index_fill(0, last.to(labels.device), IGNORE).view_as(labels)
    return labels


def document_bounds(input_ids: Tensor, separator: int) -> Tensor:
    """[B, T] -> [documents + 1] int32: where each document begins in the B x T tokens, and the end.

    A document ends with `separator`, or with its sequence.
    """
    begins = torch.ones_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = input_ids[:, :-1] == separator
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([input_ids.numel()])]).int()


def _pinned(tensor: Tensor) -> Tensor:
    """Pinned memory: a copy from it to the GPU does not hold the host."""
    return tensor.pin_memory() if on_gpu() else tensor
