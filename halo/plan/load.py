"""What a stage needs of one GPU, from its models' shapes: the part of `plan` that knows the stages.

B sequences of T tokens at a time, N = B T tokens, V words, D width. Bytes and bf16, as on a GPU.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from halo.config import CheckpointedTraining, Config, Distill, Training
from halo.errors import UserError
from halo.losses.linear_kl import LIVE_NUMBERS, LIVE_TOP_K
from halo.losses.squared_error import squared_error
from halo.measuring.importance import default_k
from halo.parallel.activations import checkpointed_call
from halo.parallel.prepare import prepare_model
from halo.plan.assumptions import BF16, FP8_PRODUCT
from halo.plan.dry_run import Cost, Operation, Work, cost_of, frozen_cost_of
from halo.plan.shapes import teacher_shapes
from halo.stages.pretrain import model_config
from halo.training.flops import align_flops, distill_flops, next_token_flops
from hypenet import HypeNetForCausalLM
from hypenet.losses import FEW_CHUNKS, IGNORE, chunk_sizes, linear_cross_entropy
from hypenet.transfer import hybrid_config

KL_BYTES = 30
"""Bytes moved for a logit of stage 2's loss: two of 4 bytes and a gradient of 2, each written once and read twice."""

REACH = 22_400
"""How many last tokens of a chunk leave anything in Lightning's state, in fp32 (halo/parallel/exchanges.py)."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One kind of layer that is trained."""

    count: int
    parameters: int
    cost: Cost
    checkpointed: Cost | None = None
    """Its cost where it keeps little more than its input, and computes the rest again in backward."""
    input_bytes: int
    """Bytes of its input, which a checkpointed layer keeps."""


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The teacher, which runs forward only."""

    parameters: int
    in_layers: int
    """Those in decoder layers, which a sharded teacher cuts over its node."""
    sharded: bool
    ranks: int = 0
    """How many ranks of each node hold only the teacher; 0: all hold it beside the student."""
    saved: int = 0
    """Bytes that its weights in FP8 are smaller than in bf16."""
    head: int = 0
    """Elements of the teacher's head that a student holds if the teacher is on other ranks."""
    work: Work


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one micro-batch needs of a GPU."""

    parameters: int
    """Trained ones."""
    layers: Sequence[Layer]
    one_at_a_time: bool = False
    """Whether only one layer's activations live at a time, and the others keep nothing."""
    checkpoints: bool = False
    """Whether the layers are checkpointed, but for `kept` of them."""
    kept: int = 0
    """How many layers keep all activations all the same."""
    held: int = 0
    """Bytes that live through forward and backward, besides what layers keep."""
    made: int = 0
    """Bytes of whole gradients that forward already made."""
    external: int = 0
    """Parameters that a module reads but does not own; ZeRO-3 keeps them gathered until the step."""
    group: int = 0
    """Elements of a parameter group of the optimizer; 0: of the largest layer."""
    head: int = 0
    """Elements of the head, if there is one."""
    tied: bool = False
    loss_held: int = 0
    """Bytes that the loss holds: its input, and the gradients that it makes in forward."""
    loss_chunk: int = 0
    """Bytes of its logits."""
    loss: Work = field(default_factory=Work)
    teacher: Frozen | None = None
    flops_per_token: float

    @property
    def depth(self) -> int:
        """The number of layers."""
        return sum(layer.count for layer in self.layers)

    def costs(self, layer: Layer) -> list[tuple[float, Cost]]:
        """The costs of a layer of a kind, each with the share of such layers that has it; the last layers' last."""
        if not self.checkpoints or layer.checkpointed is None:
            return [(1.0, layer.cost)]
        kept = min(1.0, self.kept / self.depth)
        return [(share, cost) for share, cost in ((1 - kept, layer.checkpointed), (kept, layer.cost)) if share]


@dataclass(frozen=True, kw_only=True)
class Models:
    """What the stages train and run, on the meta device."""

    source: str
    """The source of the teacher's shapes."""
    teacher: PreTrainedModel
    hybrid: PreTrainedModel
    mixers: Sequence[nn.Module]
    """Stage 1's: one for every layer."""
    scratch: PreTrainedModel | None
    """What the preset pretrains."""


def build_models(config: Config) -> Models:
    """Every model of a conversion, without weights.

    Raises:
        UserError: the teacher's shapes are not known, or there is no hybrid of this architecture from it.
    """
    shapes, source = teacher_shapes(config.teacher)
    count = config.selection.attention_layers or default_k(shapes.num_hidden_layers)
    kept = config.selection.layers or range(count)  # which layers they are changes nothing here
    switches = config.architecture.switches()
    try:
        with torch.device("meta"):
            every = hybrid_config(shapes, [], rnn_mixer=config.rnn_mixer, **switches)
            converted = HypeNetForCausalLM(every)
            hybrid = HypeNetForCausalLM(hybrid_config(shapes, kept, rnn_mixer=config.rnn_mixer, **switches))
            teacher = AutoModelForCausalLM.from_config(shapes)
            scratch = AutoModelForCausalLM.from_config(model_config(config.pretrain)) if config.pretrain else None
    except ValueError as error:
        raise UserError(f"no hybrid of this architecture from {config.teacher}: {error}") from error
    for model in (converted, hybrid, teacher, scratch):
        if model is not None:
            model.to(torch.bfloat16)
            model.config._attn_implementation = "sdpa"
    prepare_model(teacher, fused=True)
    prepare_model(hybrid, tiled=True)
    return Models(
        source=source,
        teacher=teacher.requires_grad_(False),
        hybrid=hybrid,
        mixers=[layer.get_submodule("self_attn") for layer in converted.model.layers],
        scratch=scratch,
    )


def load_of(models: Models, stage: str, training: Training, micro_batch: int) -> Load:
    """What a micro-batch of `micro_batch` sequences of a stage needs of a GPU, or of each that shares them."""
    load = _load_of(models, stage, training, micro_batch)
    if training.sequence_parallel > 1:
        load = _shared(load, models, stage, training, micro_batch)
    if isinstance(training, CheckpointedTraining) and training.activation_offload:
        load = replace(load, layers=[_offloaded_layer(layer) for layer in load.layers])
    return load


def _offloaded_layer(layer: Layer) -> Layer:
    """It keeps nothing on the GPU, and computes attention again too."""
    assert layer.checkpointed is not None
    again = [operation for operation in layer.cost.forward.operations if operation.kind == "attention"]
    backward = layer.checkpointed.backward
    backward = replace(backward, operations=backward.operations + again)
    return replace(layer, input_bytes=0, checkpointed=replace(layer.checkpointed, kept=0, backward=backward))


def _shared(whole: Load, models: Models, stage: str, training: Training, micro_batch: int) -> Load:
    """One rank's load: the bytes of its part of the tokens and of its exchange, and its part of the work."""
    ranks, tokens = training.sequence_parallel, training.seq_len // training.sequence_parallel
    part = _load_of(models, stage, replace(training, seq_len=tokens, sequence_parallel=1), micro_batch)
    width = models.hybrid.config.num_attention_heads * models.hybrid.config.head_dim
    # Lightning makes its chunk's state in fp32, of keys, decayed keys and values.
    exchange = 3 * 4 * micro_batch * min(tokens, REACH) * width

    def shared(mine: Cost, whole: Cost, kept: int) -> Cost:
        work = whole.forward.shared(ranks), whole.backward.shared(ranks)
        return Cost(kept=mine.kept + kept, peak=mine.peak + exchange, forward=work[0], backward=work[1])

    layers = []
    for mine, all_of_it in zip(part.layers, whole.layers, strict=True):
        cost, checkpointed = shared(mine.cost, all_of_it.cost, exchange), None
        if mine.checkpointed and all_of_it.checkpointed:
            checkpointed = shared(mine.checkpointed, all_of_it.checkpointed, 0)
        layers.append(replace(mine, cost=cost, checkpointed=checkpointed))
    teacher = whole.teacher and replace(whole.teacher, work=whole.teacher.work.shared(ranks))
    loss = whole.loss.shared(ranks)
    return replace(part, layers=layers, loss=loss, teacher=teacher, flops_per_token=whole.flops_per_token)


def _load_of(models: Models, stage: str, training: Training, micro_batch: int) -> Load:
    tokens = (micro_batch, training.seq_len)
    if stage == "align":
        return _align(models, *tokens)
    if stage == "distill":
        assert isinstance(training, Distill)
        return _distill(models, training, *tokens)
    model = models.hybrid if stage == "finetune" else models.scratch
    assert model is not None
    load = _next_token(model, *tokens)
    if not isinstance(training, CheckpointedTraining):
        return load
    return replace(load, checkpoints=training.activation_checkpointing, kept=max(0, training.kept_layers))


def _align(models: Models, batch: int, length: int) -> Load:
    body, mixer = models.teacher.model, models.mixers[0]
    hidden, rope = _inputs(models.teacher, batch, length)
    target = torch.empty_like(hidden)

    def regress() -> Tensor:
        return squared_error(mixer(hidden, position_embeddings=rope)[0], target)[0]

    cost = cost_of(mixer, regress)
    count, parameters = len(models.mixers), _count(mixer)
    return Load(
        parameters=count * parameters,
        layers=[Layer(count=count, parameters=parameters, cost=cost, input_bytes=0)],
        one_at_a_time=True,
        held=3 * hidden.nbytes,  # the teacher's residual, and the layer's input and target
        made=count * parameters * BF16,
        group=parameters,
        external=count * parameters,
        teacher=_frozen(models.teacher, None, batch, length),
        flops_per_token=align_flops(models.mixers, body, length),
    )


def _distill(models: Models, training: Distill, batch: int, length: int) -> Load:
    student, teacher = models.hybrid, models.teacher
    tokens, head, teacher_head = batch * length, student.lm_head.weight, teacher.lm_head.weight
    logits, width = tokens * len(head), head.shape[1] + teacher_head.shape[1]
    states = torch.empty(tokens, head.shape[1], device="meta", dtype=torch.bfloat16)
    hidden = states.nbytes
    live = LIVE_TOP_K if training.teacher_logits == "top_k" else LIVE_NUMBERS
    part, whole = chunk_sizes(states, len(head), None, live=live)
    chunk = len(head) * (part * live * 4 + whole * BF16)
    if tokens > FEW_CHUNKS * whole:  # the head's gradient is summed in float32, and copied when the chunks are gone
        chunk = head.nbytes + max(chunk, head.nbytes)
    loss = Work([Operation("product", 2 * logits * (width + 2 * head.shape[1]), 0)])
    loss.operations.append(Operation("kernel", 0, logits * KL_BYTES))
    return Load(
        parameters=_count(student),
        layers=_layers(student, batch, length),
        checkpoints=training.activation_checkpointing,
        kept=max(0, training.kept_layers),
        held=_supplied(training, tokens, teacher_head) + hidden,  # the teacher's logits, the last norm's input
        external=head.numel(),
        head=head.numel(),
        tied=student.config.tie_word_embeddings,
        loss_held=2 * hidden + head.nbytes,
        loss_chunk=chunk,
        loss=loss,
        teacher=_frozen(teacher, training, batch, length),
        flops_per_token=distill_flops(student, teacher, length),
    )


def _next_token(model: PreTrainedModel, batch: int, length: int) -> Load:
    head = model.lm_head
    hidden = torch.empty(batch * length, head.in_features, device="meta", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.full((batch * length,), IGNORE, device="meta")
    cost = cost_of(head, lambda: linear_cross_entropy(hidden, head.weight, labels))
    return Load(
        parameters=_count(model),
        layers=_layers(model, batch, length),
        held=hidden.nbytes,
        external=head.weight.numel(),
        head=head.weight.numel(),
        tied=model.config.tie_word_embeddings,
        loss_held=hidden.nbytes + cost.kept,
        loss_chunk=cost.peak - cost.kept,
        loss=cost.forward,
        flops_per_token=next_token_flops(model, length),
    )


def _layers(model: PreTrainedModel, batch: int, length: int) -> list[Layer]:
    """The decoder layers by kind: one of each is run, those of a kind cost the same."""
    kinds = getattr(model.config, "mixer_types", ["attention"] * len(model.model.layers))
    hidden, rope = _inputs(model, batch, length)
    hidden.requires_grad_()
    found = []
    for kind, count in Counter(kinds).items():
        layer = model.model.layers[kinds.index(kind)]
        cost, checkpointed = (
            cost_of(layer, _layer_call(run, hidden, rope)) for run in (layer, checkpointed_call(layer))
        )
        found.append(
            Layer(
                count=count,
                parameters=_count(layer),
                cost=cost,
                checkpointed=checkpointed,
                input_bytes=hidden.nbytes,
            )
        )
    return found


def _supplied(training: Distill, tokens: int, head: Tensor) -> int:
    """Bytes of a micro-batch's logits as the teacher supplies them."""
    words, width = head.shape
    return (
        tokens
        * {"factored": width * BF16, "full": words * BF16, "top_k": 8 * training.teacher_top_k + 8}[
            training.teacher_logits
        ]
    )


def _frozen(teacher: PreTrainedModel, training: Distill | None, batch: int, length: int) -> Frozen:
    """The teacher as a stage runs it.

    Args:
        training: stage 2's settings; None: stage 1, where each rank holds the whole.
    """
    layers = teacher.model.layers
    _, work = frozen_cost_of(_layer_call(layers[0], *_inputs(teacher, batch, length)))
    factored = training is not None and training.teacher_logits == "factored"
    fp8 = training is not None and training.teacher_fp8
    if fp8:
        work = replace(work, operations=[_in_fp8(operation) for operation in work.operations])
    return Frozen(
        parameters=_count(teacher),
        in_layers=_count(layers),
        sharded=training is not None and training.teacher_sharded,
        ranks=training.teacher_ranks if training else 0,
        saved=fp8 * sum(_saved_by_fp8(module) for module in layers.modules() if isinstance(module, nn.Linear)),
        head=teacher.lm_head.weight.numel() * factored,
        work=Work(work.operations * len(layers), work.dispatched * len(layers)),
    )


def _in_fp8(operation: Operation) -> Operation:
    return replace(operation, flops=operation.flops * (FP8_PRODUCT if operation.kind == "product" else 1))


def _saved_by_fp8(linear: nn.Linear) -> int:
    """Bytes: a weight has one in place of two, and each output a scale of four."""
    return linear.weight.numel() * (BF16 - 1) - 4 * linear.out_features


def _layer_call(layer: Callable[..., Any], hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        output = layer(hidden, position_embeddings=rope, attention_mask=None)
        return output[0] if isinstance(output, tuple) else output

    return run


def _inputs(model: PreTrainedModel, batch: int, length: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A layer's input [B, T, D], and RoPE's cos and sin [1, T, head_dim]."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.device("meta"):
        hidden = torch.empty(batch, length, config.hidden_size, dtype=torch.bfloat16)
        rope = torch.empty(1, length, width, dtype=torch.bfloat16), torch.empty(1, length, width, dtype=torch.bfloat16)
    return hidden, rope


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
