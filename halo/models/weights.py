"""The weights in a model's files, one tensor at a time: rank 0 reads them, and no rank's memory ever holds all.

    weights = Weights(lambda: SafeTensors(weight_files(folder)))
    weights.take("model.norm.weight")   # on this rank's device, in training precision

On rank 0 that is the tensor; on the other ranks, which read nothing, it is memory of its shape. All ranks then get
their part at once, by `distributed.broadcast` or by ZeRO-3's partitioning, a piece of the model at a time
(halo/models/build.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from halo.distributed import device, on_rank0
from halo.errors import UserError
from halo.models.loading import training_dtype

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class SafeTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, on the CPU, mapped into memory when they are read.

    Raises:
        UserError: a file is missing or incomplete.
    """

    def __init__(self, files: Iterable[Path]):
        self._file_of: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")  # reads the header, which says how long the file is
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read: {error}: copy it again, whole") from error
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


class Weights:
    """Named tensors that only rank 0 reads. Every rank makes this object, and takes the same tensors in the same order.

    Args:
        source: returns the tensors by name; called on rank 0.

    Raises:
        UserError: `source` raised it; on every rank.
    """

    def __init__(self, source: Callable[[], Mapping[str, Tensor]]):
        self._source: Mapping[str, Tensor] = {}

        def open_() -> dict[str, torch.Size]:
            self._source = source()
            return {name: tensor.shape for name, tensor in self._source.items()}

        self.shapes = on_rank0(open_)

    def take(self, name: str) -> Tensor:
        """A new tensor on this rank's device, in training precision. Only rank 0's has the values."""
        if name in self._source:
            # Always a copy: memory that is mapped from a file is lost with the file.
            return self._source[name].to(device(), training_dtype(), copy=True)
        return torch.empty(self.shapes[name], dtype=training_dtype(), device=device())


def check_shapes(tensors: Mapping[str, Tensor], model: PreTrainedModel, whose: str) -> None:
    """Check that `tensors` are the weights of a causal language model, by their shapes.

    Args:
        whose: names the model in the error, e.g. "the teacher at /models/qwen3".

    Raises:
        UserError: a weight is missing, unknown, quantized or of another shape; the model ties its head to its
            embedding, but they are two.
    """
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    unknown = {name for name in tensors.keys() - expected.keys() if not name.endswith("rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings:
        del expected[HEAD]
        if HEAD in tensors and EMBEDDING in tensors and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
            raise UserError(
                f"{whose} has its own head ({HEAD}), but its configuration ties it to the embedding: "
                "set tie_word_embeddings to false in its config.json"
            )
    if missing := expected.keys() - tensors.keys():
        raise UserError(f"{whose} lacks weights, {min(missing)} among them")
    if unknown:
        raise UserError(f"{whose} has weights that its architecture does not have, {min(unknown)} among them")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{whose} has a {name} of {list(tensors[name].shape)}, but its configuration says {list(shape)}"
            )
        if (dtype := tensors[name].dtype) not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise UserError(f"{whose} is quantized ({name} is {dtype}): take the model that it was made from")
