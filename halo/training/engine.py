"""DeepSpeed, behind one class: the only module that imports it.

The JSON file says how ZeRO, offload and communication work, and nothing else. Batch, clipping and precision come
from the preset; a JSON file that contradicts it is refused.
"""

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero import GatheredParameters, Init, register_external_parameter
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from halo.config import Training
from halo.distributed import broadcast, device, rank, world_size
from halo.errors import UserError
from halo.training.gradients import Gradients, by_layer

deepspeed_logger.setLevel(logging.WARNING)
# On a CPU, DeepSpeed would compile a collective of its own at the first start, which needs a compiler. Gloo does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

OURS = ("optimizer", "scheduler", "fp16", "amp", "activation_checkpointing", "tensorboard")

ALONE = {"overlap_comm": False, "contiguous_gradients": False, "reduce_bucket_size": 20_000_000}
"""Of ZeRO where there is nobody to exchange with: overlap has the host wait for the GPU, and copies of gradients that
are made to be exchanged take memory."""


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises:
        UserError: the file is missing, is not JSON, sets what the preset sets, or no ZeRO that can skip a step.
    """
    try:
        config = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"no DeepSpeed config at {path}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    for key in OURS:
        if key in config:
            raise UserError(f"{path} sets '{key}', which HALO's preset decides: remove it")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise UserError(f"{path} has no zero_optimization with stage 1, 2 or 3: set one, also for a single GPU")
    if not zero.get("compute_grad_norm", True):
        raise UserError(
            f"{path} sets compute_grad_norm = false, but the norm tells a step that must be skipped: remove it"
        )
    return config


def split_batch(training: Training, ranks: int | None = None) -> tuple[int, int]:
    """How a batch is taken: (sequences a rank, or a group that shares them, takes at once, times it does so a step).

    Args:
        ranks: how many there are. None: as many as run here.

    Raises:
        UserError: the ranks, or their groups, do not divide the batch.
    """
    degree = training.sequence_parallel
    readers = (world_size() if ranks is None else ranks) // degree
    who = f"{readers} ranks" if degree == 1 else f"{readers} groups of {degree} ranks"
    share, rest = divmod(training.batch, readers)
    if share == 0:
        raise UserError(f"{who} are more than the {training.batch} samples of a batch: use fewer ranks")
    if rest:
        most = max(n for n in range(1, readers) if training.batch % n == 0)
        raise UserError(f"{who} do not divide a batch of {training.batch}: use {most * degree} ranks")
    micro = max(n for n in range(1, share + 1) if share % n == 0 and n <= training.micro_batch)
    return micro, share // micro


def complete_ds_config(config: dict[str, Any], training: Training) -> dict[str, Any]:
    """The JSON's settings with the preset's batch, clipping and precision filled in."""
    micro_batch, accumulation = split_batch(training)
    ours = {
        "train_batch_size": micro_batch * accumulation * world_size(),  # it counts a rank's part of a sample as one
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.clip,
        "bf16": {"enabled": torch.cuda.is_available()},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for key, value in ours.items():
        if config.get(key, value) not in (value, "auto"):
            raise UserError(
                f"the DeepSpeed config says {key} = {config[key]}, the preset {value}: remove it from the JSON"
            )
    zero = config.get("zero_optimization", {})
    alone = ALONE if world_size() == 1 else {}
    return {**config, **ours, "zero_optimization": zero | alone}


def placement(ds_config: dict[str, Any], training: Training) -> Callable[[nn.Module], None]:
    """What takes a new piece of the model, with its values on rank 0, and leaves each rank what it is to hold of it.

    Under ZeRO-3 that is the rank's partition, where `offload_param` says; else the whole piece. Buffers stay.
    """
    settings = complete_ds_config(ds_config, training)
    if settings["zero_optimization"]["stage"] < 3:
        return lambda piece: broadcast(piece.parameters())
    partitioned: list[Any] = []

    def partition(piece: nn.Module) -> None:
        if not partitioned:
            deepspeed.init_distributed()  # it takes the number of ranks from there
            Init(module=piece, config_dict_or_path=settings)
        else:  # as `deepspeed.initialize` does what is left: one Init has one set of groups and buffers
            partitioned[0].convert_to_zero_parameters(list(piece.parameters()))
        partitioned.extend(piece.parameters())

    return partition


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The decoder layers in a module."""
    return [layer for layer in module.modules() if type(layer).__name__.endswith("DecoderLayer")]


def whole_size(parameter: nn.Parameter) -> int:
    """The number of elements of a parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_numel", parameter.numel())


class Engine:
    """A module, its AdamW and ZeRO's partitions of both.

    Args:
        module: what is trained, whole on every rank, or placed by `placement` with the same settings. Its forward
            returns `(loss, metrics)`.
        training: batch, optimizer and clipping.
        ds_config: as read from JSON.
        external: parameters that a module's forward reads though a child owns them (a fused loss and its head).
        clip_apart: whether each layer's gradient is clipped by its own norm, not all by the norm of all.
    """

    def __init__(
        self,
        module: nn.Module,
        training: Training,
        ds_config: dict[str, Any],
        external: Iterable[tuple[nn.Module, nn.Parameter]] = (),
        *,
        clip_apart: bool = False,
    ):
        self.module = module.to(device())
        layers = by_layer(module)
        optimizer = torch.optim.AdamW(
            # A group a layer: ZeRO makes float32 gradients of one group at a time.
            [{"params": layer} for layer in layers.values()],
            lr=0.0,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=True,
        )
        settings = complete_ds_config(ds_config, training)
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        for layer in layers_of(module):  # ZeRO-3 gathers a layer at once: looking at each module of it takes the host
            set_z3_leaf_module(layer, True)  # longer than the GPU has work
        self._engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=settings)
        # DeepSpeed casts buffers with the weights: RoPE's frequencies in bf16 are off by radians at long context.
        for name, buffer in self.module.named_buffers():
            buffer.data = buffers[name]
        self._gradients = Gradients(self._engine.optimizer, layers, training.clip, apart=clip_apart)
        self._snapshots = self._engine.checkpoint_engine = _Snapshots()
        # Copies of its conversion scripts: they would be written apart from all the rest.
        self._engine._copy_recovery_script = lambda folder: None
        self._sharded = self._engine.zero_optimization_partition_weights()
        if self._sharded:
            for owner, parameter in external:
                register_external_parameter(owner, parameter)

    @property
    def zero_stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    def accumulate(self, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Forward and backward of one micro-batch. Returns its loss and metrics, detached."""
        loss, metrics = self._engine(**inputs)
        # A loss that is not finite makes its gradients so: they alone decide on every rank (`step`).
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
        return loss.detach(), metrics

    def step(self, lr: float) -> None:
        """Take the optimizer's step if this micro-batch completes the batch.

        Where the global gradient norm is not finite, ZeRO (of each stage, in each precision) drops the gradients and
        leaves weights and optimizer as they are. The norm is a sum over the ranks, so all of them do.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def skipped(self) -> bool:
        """Whether the step that completed the last batch was left out: a loss or gradient was not finite."""
        return not self._engine.was_step_applied()

    def gradient_norms(self) -> dict[str, float]:
        """Before clipping, of the last step: `gradient_norm` of all, `gradient_norm/<layer>` of each layer."""
        norms = self._gradients.norms()
        return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))

    def parameters_on_rank0(self) -> dict[str, torch.Tensor]:
        """The whole, unpartitioned parameters on rank 0's CPU (empty elsewhere). Every rank must call this."""
        whole = {}
        for name, parameter in self.module.named_parameters():
            with GatheredParameters([parameter], enabled=self._sharded):
                if rank() == 0:
                    whole[name] = parameter.detach().cpu().clone()
        return whole

    def snapshot(self, folder: Path) -> dict[Path, Any]:
        """Copy this rank's shards to host memory. Every rank must call this. Nothing is written.

        Returns:
            Path in `folder` -> what torch.save shall write there, for `load`.
        """
        self._engine.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state={UNIVERSAL_CHECKPOINT_INFO: {}},  # what allows `convert` of ZeRO 1 and 2
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        return self._snapshots.take()

    def load(self, folder: Path, *, converted: bool = False) -> None:
        """Restore a snapshot's files, written on as many ranks, or what `convert` made of it."""
        self._engine._config.load_universal_checkpoint = converted
        path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=False)
        if path is None:
            raise FileNotFoundError(f"no checkpoint of DeepSpeed in {folder}")
        if converted:
            for parameter, state in self._engine.optimizer.optimizer.state.items():
                # DeepSpeed hands one tensor, on the CPU, to all: each would count every parameter group's steps.
                state["step"] = state["step"].to(parameter.device, copy=True)

    @staticmethod
    def convert(folder: Path, into: Path) -> None:
        """Rewrite a snapshot's files so that any number of ranks can load them, under the same ZeRO stage. On one rank.

        Raises:
            OSError: it could not be read or written.
        """
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]  # a process: it forks workers
        command += ["--input_folder", str(folder), "--output_folder", str(into)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip().rpartition("\n")[2])

    def close(self) -> None:
        """Free ZeRO's hooks and buffers, so that another engine can follow in this process."""
        self._engine.destroy()


class _Snapshots(TorchCheckpointEngine):
    """Takes what DeepSpeed would write, as it is now: training goes on changing the originals."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[Path, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        self._taken[Path(path)] = _on_host(state_dict)

    def take(self) -> dict[Path, Any]:
        taken, self._taken = self._taken, {}
        return taken


def _on_host(value: Any) -> Any:
    """A deep copy whose tensors are in host memory. Two that are one (tied weights) stay one.

    Not in pinned memory: torch would round each tensor up to a power of two, and keep it for the rest of the run.
    """
    memo: dict[int, Any] = {}  # deepcopy's: what stands for the object with an id
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    for tensor in _tensors(value):
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = copies[place]
    return copy.deepcopy(value, memo)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
