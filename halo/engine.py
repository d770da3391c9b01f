"""DeepSpeed, behind one class: the only module that imports it.

The JSON file says how ZeRO, offload and communication work, and nothing else. Batch, clipping and precision come
from the preset; a JSON file that contradicts it is refused.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import GatheredParameters, register_external_parameter
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from halo.config import Training
from halo.distributed import device, rank, world_size
from halo.errors import UserError

deepspeed_logger.setLevel(logging.WARNING)
# On a CPU, DeepSpeed would compile a collective of its own at the first start, which needs a compiler. Gloo does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

OURS = ("optimizer", "scheduler", "fp16", "amp", "activation_checkpointing", "tensorboard")


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises:
        UserError: the file is missing, is not JSON, or sets what the preset sets.
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
    return config


def split_batch(training: Training) -> tuple[int, int]:
    """How a batch is taken: (sequences a rank takes at once, times it does so for one optimizer step).

    Raises:
        UserError: the ranks do not divide the batch.
    """
    share, rest = divmod(training.batch, world_size())
    if share == 0:
        raise UserError(f"{world_size()} ranks are more than the {training.batch} samples of a batch: use fewer ranks")
    if rest:
        most = max(n for n in range(1, world_size()) if training.batch % n == 0)
        raise UserError(f"{world_size()} ranks do not divide a batch of {training.batch}: use {most} ranks")
    micro = max(n for n in range(1, share + 1) if share % n == 0 and n <= training.micro_batch)
    return micro, share // micro


def complete_ds_config(config: dict[str, Any], training: Training) -> dict[str, Any]:
    """The JSON's settings with the preset's batch, clipping and precision filled in."""
    micro_batch, accumulation = split_batch(training)
    ours = {
        "train_batch_size": training.batch,
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
    return {**config, **ours}


class Engine:
    """A module, its AdamW and ZeRO's partitions of both.

    Args:
        module: what is trained, built whole on every rank. Its forward returns `(loss, metrics)`.
        training: batch, optimizer and clipping.
        ds_config: as read from JSON.
        external: parameters that a module's forward reads though a child owns them (a fused loss and its head).
    """

    def __init__(
        self,
        module: nn.Module,
        training: Training,
        ds_config: dict[str, Any],
        external: Iterable[tuple[nn.Module, nn.Parameter]] = (),
    ):
        self.module = module.to(device())
        optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=0.0,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=True,
        )
        settings = complete_ds_config(ds_config, training)
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        self._engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=settings)
        # DeepSpeed casts buffers with the weights: RoPE's frequencies in bf16 are off by radians at long context.
        for name, buffer in self.module.named_buffers():
            buffer.data = buffers[name]
        self._sharded = self._engine.zero_optimization_partition_weights()
        if self._sharded:
            for owner, parameter in external:
                register_external_parameter(owner, parameter)

    def partition(self) -> dict[str, int]:
        """How the state is cut: only the same cut can load it again."""
        return {"ranks": world_size(), "zero_stage": self._engine.zero_optimization_stage()}

    def accumulate(self, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Forward and backward of one micro-batch. Returns its loss and metrics, detached."""
        loss, metrics = self._engine(**inputs)
        self._engine.backward(loss)
        return loss.detach(), metrics

    def step(self, lr: float) -> None:
        """Take the optimizer's step if this micro-batch completes the batch."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def gradient_norm(self) -> float:
        """The last step's global gradient norm, before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def parameters_on_rank0(self) -> dict[str, torch.Tensor]:
        """The whole, unpartitioned parameters on rank 0's CPU (empty elsewhere). Every rank must call this."""
        whole = {}
        for name, parameter in self.module.named_parameters():
            with GatheredParameters([parameter], enabled=self._sharded):
                if rank() == 0:
                    whole[name] = parameter.detach().cpu().clone()
        return whole

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write the engine's shards and `state` into `folder`. Every rank must call this."""
        self._engine.save_checkpoint(str(folder), tag="engine", client_state=state, save_latest=False)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what `save` wrote; returns its `state`."""
        try:
            path, state = self._engine.load_checkpoint(str(folder), tag="engine")
        except Exception as error:  # torch, zip and DeepSpeed each have their own for a file that is cut short
            reason = str(error).partition("\n")[0]
            raise UserError(f"{folder} is damaged ({reason}): remove it to start the stage again") from error
        if path is None:
            raise UserError(f"{folder} is not whole: remove it to start the stage again")
        return state

    def close(self) -> None:
        """Free ZeRO's hooks and buffers, so that another engine can follow in this process."""
        self._engine.destroy()
