"""DeepSpeed, behind one class: the only module that imports it.

The JSON file says how ZeRO, offload and communication work, and nothing else. Batch, clipping and precision come
from the preset; a JSON file that contradicts it is refused.
"""

import logging
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero import GatheredParameters, Init, register_external_parameter
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_module
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn

from halo.accelerator import on_gpu
from halo.config import Training
from halo.distributed import broadcast, device, rank, world_size
from halo.errors import UserError
from halo.json_files import mismatch, read_json
from halo.tables import suggest
from halo.teacher.batch import Batch
from halo.training.background import on_host
from halo.training.fused_step import FusedStep, fused_step_serves
from halo.training.gathering import fill_gathering
from halo.training.gradients import Gradients, by_layer
from halo.training.pickles import without_code
from halo.training.recording import Minimised, worth_recording

T = TypeVar("T")

deepspeed_logger.setLevel(logging.WARNING)
# On a CPU, DeepSpeed would compile a collective of its own at the first start. Gloo has it, and needs no compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

PRESET_KEYS = ("optimizer", "scheduler", "fp16", "amp", "activation_checkpointing", "tensorboard")
"""Keys that a JSON file must not have: the preset decides them."""

Switches = dict[str, bool | int | float | str | None]
OWN_KEYS: dict[str, Any] = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), int | str),
    **dict.fromkeys(("gradient_clipping", "gradient_predivide_factor"), float | str),
    **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients"), bool),
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), bool),
    **dict.fromkeys(("bf16", "aio", "flops_profiler"), Switches),
    **{"zero_optimization": DeepSpeedZeroConfig, "comms_logger": CommsLoggerConfig, "timers": dict[str, Switches]},
    **{"communication_data_type": str | None, "steps_per_print": int | None},
}
"""Keys that it may have, and their types. DeepSpeed takes any other without a word, a misspelt one too."""
ZERO_KEYS = {key for name, field in DeepSpeedZeroConfig.model_fields.items() for key in (name, field.alias) if key}

CHECKPOINT_TYPES = [ZeroStageEnum, LossScaler, fragment_address]
"""What its checkpoints hold beside tensors, numbers, strings, lists and dictionaries. None of them can run code."""

SINGLE_RANK_ZERO = {"overlap_comm": False, "contiguous_gradients": False, "reduce_bucket_size": 20_000_000}
"""ZeRO settings for a single rank: overlap makes the host wait; bucket copies waste memory."""


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises:
        UserError: the file is missing, is no JSON object, has an unknown key or one that the preset decides, or no ZeRO
            stage that can skip a step.
    """
    if not Path(path).exists():
        raise UserError(f"no DeepSpeed config at {path}")
    config: dict[str, Any] = read_json(Path(path), dict[str, Any], "correct it, or take one of ds_configs/")
    for key in PRESET_KEYS:
        if key in config:
            raise UserError(f"{path} sets '{key}', which HALO's preset decides: remove it")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{path} is no DeepSpeed config: its zero_optimization must be a JSON object")
    for keys, known, where in ((config, OWN_KEYS, path), (zero, ZERO_KEYS, f"zero_optimization in {path}")):
        for key in keys:
            if key not in known:
                raise UserError(f"{where} has the key '{key}', which means nothing here{suggest(key, list(known))}")
    for key, value in config.items():
        if problem := mismatch(value, OWN_KEYS[key]):
            raise UserError(f"{path}: {key}.{problem}" if isinstance(value, dict) else f"{path}: {key} is {value!r}")
    if type(zero.get("stage")) is not int or zero["stage"] not in (1, 2, 3):
        raise UserError(f"{path} has no zero_optimization with stage 1, 2 or 3: set one, also for a single GPU")
    if not zero.get("compute_grad_norm", True):
        raise UserError(f"{path} sets compute_grad_norm = false, but the norm tells which step to skip: remove it")
    return config


def split_batch(training: Training, ranks: int | None = None) -> tuple[int, int]:
    """(sequences of a micro-batch, micro-batches of a step): those of a rank, or of a group of ranks that share them.

    Args:
        ranks: the number of ranks. None: those that run here.

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
    """The JSON's settings with the preset's batch, clipping and precision filled in.

    Raises:
        UserError: the JSON contradicts the preset, or the ranks do not divide the batch.
    """
    micro_batch, accumulation = split_batch(training)
    ours = {
        "train_batch_size": micro_batch * accumulation * world_size(),  # a rank's part of a sample counts as one
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.clip,
        "bf16": {"enabled": on_gpu()},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for key, value in ours.items():
        if config.get(key, value) not in (value, "auto"):
            raise UserError(
                f"the DeepSpeed config says {key} = {config[key]}, the preset {value}: remove it from the JSON"
            )
    # DeepSpeed's own timer would let the host wait for the GPU twice a step.
    timers = {"timers": {"throughput": {"enabled": False}}}
    zero = config.get("zero_optimization", {})
    single = SINGLE_RANK_ZERO if world_size() == 1 else {}
    return {**timers, **config, **ours, "zero_optimization": zero | single}


def placement(ds_config: dict[str, Any], training: Training) -> Callable[[nn.Module], None]:
    """A function that distributes a new piece of the model, whose values rank 0 has, over the ranks.

    Under ZeRO-3 each rank keeps its partition of the parameters (where `offload_param` says), else all of them. Buffers
    stay as they are.
    """
    settings = complete_ds_config(ds_config, training)
    if settings["zero_optimization"]["stage"] < 3:
        return lambda piece: broadcast(piece.parameters())
    partitioned: list[Any] = []

    def partition(piece: nn.Module) -> None:
        if not partitioned:
            deepspeed.init_distributed()  # Init reads the number of ranks from there
            Init(module=piece, config_dict_or_path=settings)
        else:  # as `deepspeed.initialize` does with the rest of a model: every Init makes groups and buffers of its own
            partitioned[0].convert_to_zero_parameters(list(piece.parameters()))
        partitioned.extend(piece.parameters())

    return partition


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The decoder layers in a module."""
    return [layer for layer in module.modules() if type(layer).__name__.endswith("DecoderLayer")]


def whole_size(parameter: nn.Parameter) -> int:
    """The number of elements of a parameter, also if ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_numel", parameter.numel())


class Engine:
    """A module, its AdamW and ZeRO's partitions of both.

    Args:
        module: the module to train, whole on every rank, or distributed by `placement` with the same settings. Its
            forward takes a Batch and returns `(loss, metrics)`.
        training: batch, optimizer and clipping.
        ds_config: as `read_ds_config` gives it.
        external: (module, parameter) pairs where a module's forward reads a parameter that a child owns (a fused loss
            and its head).
        clip_apart: whether each layer's gradient is clipped by its own norm, not by the norm of all.
        runs_alike: whether the module runs the same kernels for every batch of a shape, and exchanges nothing.
        late_gradients: whether its backward gives away all gradients at its end.
    """

    def __init__(
        self,
        module: nn.Module,
        training: Training,
        ds_config: dict[str, Any],
        external: Iterable[tuple[nn.Module, nn.Parameter]] = (),
        *,
        clip_apart: bool = False,
        runs_alike: bool = False,
        late_gradients: bool = False,
    ):
        self.module = module.to(device())
        layers = by_layer(module)
        trained = [parameter for layer in layers.values() for parameter in layer]
        _, accumulation = split_batch(training)
        may = runs_alike and _stays(ds_config) and worth_recording(trained, accumulation, late=late_gradients)
        module.forward = Minimised(module, accumulation, recordable=may)
        optimizer = torch.optim.AdamW(
            # One group for each layer: ZeRO makes float32 gradients of one group at a time.
            [{"params": layer} for layer in layers.values()],
            lr=0.0,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=True,
        )
        external = list(external)
        settings = complete_ds_config(ds_config, training)
        settings["zero_optimization"] = fill_gathering(
            settings["zero_optimization"],
            [[whole_size(p) for p in parameters] for name, parameters in layers.items() if name.isdecimal()],
            sum(whole_size(parameter) for _, parameter in external),
        )
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        for layer in layers_of(module):  # ZeRO-3 gathers a whole layer: hooks of each module in it would keep the host
            set_z3_leaf_module(layer, True)  # busy for longer than the GPU has work
        self._engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=settings)
        # DeepSpeed casts buffers with the weights: in bf16, RoPE's angles are wrong by radians at long context.
        for name, buffer in self.module.named_buffers():
            buffer.data = buffers[name]
        self._gradients = Gradients(self._engine.optimizer, layers, training.clip, apart=clip_apart)
        if world_size() == 1:
            _reduce_nothing(self._engine.optimizer)
        if fused_step_serves(self._engine.optimizer):
            FusedStep(self._engine.optimizer, self._gradients, partial(_gather_weights, self._engine.optimizer))
        self._snapshots = self._engine.checkpoint_engine = _Snapshots()
        # It would write copies of its conversion scripts beside our checkpoint files.
        self._engine._copy_recovery_script = lambda folder: None
        self._sharded = self._engine.zero_optimization_partition_weights()
        if self._sharded:
            for owner, parameter in external:
                register_external_parameter(owner, parameter)

    @property
    def zero_stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    def accumulate(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Forward and backward of one micro-batch. Returns its loss and metrics, scalars without gradient."""
        minimised, loss, metrics = self._engine(batch)
        self._engine.backward(minimised, scale_wrt_gas=False)
        return loss, metrics

    def measure(self, function: Callable[[], T]) -> T:
        """Call `function`, which may run the module or parts of it, in evaluation mode and without gradients.

        It stands in the place of the module's forward, so that ZeRO-3 gathers what it uses: every rank must run the
        same parts in the same order.
        """
        forward, self.module.forward = self.module.forward, function
        self.module.eval()
        try:
            with torch.no_grad():
                return self.module()
        finally:
            self.module.train()
            self.module.forward = forward

    def step(self, lr: float) -> None:
        """Make the optimizer's step if this micro-batch completes the batch.

        If the global gradient norm is not finite, ZeRO (in every stage and precision) drops the gradients and leaves
        weights and optimizer unchanged. The norm is a sum over the ranks, so all ranks do the same.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def skipped(self) -> bool:
        """Whether the last step was skipped: a loss or gradient was not finite."""
        return not self._engine.was_step_applied()

    def gradient_norms(self) -> dict[str, float]:
        """The last step's norms before clipping: `gradient_norm` of all, `gradient_norm/<layer>` of each layer."""
        return self._gradients.norms()

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
            Path in `folder` -> the content that torch.save must write there for `load`.
        """
        self._engine.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state={UNIVERSAL_CHECKPOINT_INFO: {}},  # `convert` needs it under ZeRO 1 and 2
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        return self._snapshots.take()

    def load(self, folder: Path, *, converted: bool = False) -> None:
        """Load a snapshot that the same number of ranks wrote, or what `convert` made of one."""
        self._engine._config.load_universal_checkpoint = converted
        with without_code(CHECKPOINT_TYPES):
            path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=False)
        if path is None:
            raise FileNotFoundError(f"no checkpoint of DeepSpeed in {folder}")
        if converted:
            for parameter, state in self._engine.optimizer.optimizer.state.items():
                # DeepSpeed gives all parameters the same tensor: it would count the steps of every parameter group.
                state["step"] = state["step"].to(parameter.device, copy=True)

    @staticmethod
    def convert(folder: Path, into: Path) -> None:
        """Rewrite a snapshot's files so that any number of ranks can load them, under the same ZeRO stage. On one rank.

        Raises:
            OSError: it could not be read or written.
        """
        command = [sys.executable, "-c", f"from {__name__} import convert_snapshot; convert_snapshot()"]
        command += ["--input_folder", str(folder), "--output_folder", str(into)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip().rpartition("\n")[2])

    def close(self) -> None:
        """Free ZeRO's hooks and buffers, so that another engine can follow in this process."""
        self._engine.destroy()


def convert_snapshot() -> None:
    """The work of `Engine.convert`, in a process of its own, because it forks workers."""
    multiprocessing.set_start_method("fork")  # workers that start anew would not have the types of `without_code`
    with without_code(CHECKPOINT_TYPES):
        ds_to_universal.main(ds_to_universal.parse_arguments())


def _stays(ds_config: dict[str, Any]) -> bool:
    """Whether weights and gradients stay on the GPU and whole, from step to step."""
    zero = ds_config["zero_optimization"]
    return zero["stage"] < 3 and "offload_optimizer" not in zero


def _reduce_nothing(zero: Any) -> None:
    """Let ZeRO-1 and 2 on a single rank leave gradients where backward puts them.

    There is nothing to reduce, but DeepSpeed would copy all gradients into a bucket and back. An optimizer on the host
    gets its gradients on that way.
    """
    if not hasattr(zero, "fp16_groups") and not zero.cpu_offload:
        zero.reduce_ready_partitions_and_remove_grads = lambda parameter, group: None


def _gather_weights(zero: Any) -> None:
    """Let every rank have the weights that each has stepped, as ZeRO-1 and 2 do after their step."""
    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )


class _Snapshots(TorchCheckpointEngine):
    """Copies what DeepSpeed would write: training continues to change the originals."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[Path, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        self._taken[Path(path)] = on_host(state_dict)

    def take(self) -> dict[Path, Any]:
        taken, self._taken = self._taken, {}
        return taken
