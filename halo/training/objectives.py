"""What each stage trains: a model and a loss."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo.losses.linear_kl import linear_kl
from halo.losses.squared_error import squared_error
from halo.parallel.exchanges import parallelize
from halo.parallel.prepare import prepare_model
from halo.parallel.sequence import SequenceGroup
from halo.teacher.batch import Batch
from halo.teacher.colocated import Teacher, TeacherSource
from halo.training.flops import align_flops, distill_flops, next_token_flops
from halo.training.trainer import Objective
from hypenet.losses import handed_out, linear_cross_entropy


class Alignment(Objective):
    """Stage 1 (Sec. 4.2): every RNN layer learns the output of its attention layer, on the teacher's hidden states.

    A layer's loss and gradients are made while the teacher's forward passes the layer. So the activations of only one
    layer are in memory at a time.

    Args:
        mixers: layer index -> the RNN layer that may replace it.
        teacher: the frozen Transformer.
    """

    clip_apart = True  # the layers are regressions of their own
    late_gradients = True

    def __init__(self, mixers: Mapping[int, nn.Module], teacher: Teacher):
        super().__init__()
        parallelize(mixers.values(), teacher.sequence)
        self.mixers = nn.ModuleDict({str(layer): mixer for layer, mixer in mixers.items()})
        self.regressions = nn.ModuleDict({name: _Regression(mixer) for name, mixer in self.mixers.items()})
        self._teacher = teacher

    def external_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        return [(self.regressions[name], p) for name, mixer in self.mixers.items() for p in mixer.parameters()]

    def words(self) -> int:
        return self._teacher.model.config.vocab_size

    def runs_alike(self) -> bool:
        return not self._teacher.communicates()

    def flops_per_token(self, seq_len: int) -> float:
        return align_flops(self.mixers.values(), self._teacher.model.model, seq_len)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the layers' losses (Eq. 7): a layer's gradient depends on no other layer.

        Logs `relative/<layer>`, a layer's loss over its target's mean square (1: no better than an output of zeros),
        and `relative`, their mean.
        """
        losses: dict[str, Tensor] = {}
        relative: dict[str, Tensor] = {}

        def regress(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
                with torch.enable_grad():  # the teacher's forward has none
                    loss, silence = self.regressions[name](
                        kwargs["hidden_states"], kwargs["position_embeddings"], output[0]
                    )
                losses[name] = loss
                relative[f"relative/{name}"] = loss.detach() / silence

            return hook

        layers = self._teacher.layers
        handles = [
            layers[int(name)].get_submodule("self_attn").register_forward_hook(regress(name), with_kwargs=True)
            for name in self.mixers
        ]
        try:
            self._teacher.hidden_states(batch.input_ids)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(list(losses.values())).sum(), {
            "relative": torch.stack(list(relative.values())).mean()
        } | relative


class _Regression(nn.Module):
    """One layer's loss. Forward makes the gradients too, and backward hands them out."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self._mixer = [mixer]  # in a list: `Alignment.mixers` names its parameters

    def forward(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden and target [B, T, D] -> the mean squared error, and the target's mean square; scalars."""
        (mixer,) = self._mixer
        output, _ = mixer(hidden_states=hidden, position_embeddings=position_embeddings, attention_mask=None)
        loss, silence = squared_error(output, target)
        parameters = list(mixer.parameters())
        return _Made.apply(loss.detach(), torch.autograd.grad(loss, parameters), *parameters), silence


class _Made(torch.autograd.Function):
    """A scalar loss, with gradients of `parameters` that exist already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *handed_out(ctx, grad)


class Headed(Objective):
    """A causal language model whose loss applies the head, chunk by chunk.

    Args:
        sequence: the ranks that share each sequence with this one, which trains on its chunk. None: not shared.
        activation_checkpointing, kept_layers, activation_offload: see `prepare_model`.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        *,
        sequence: SequenceGroup | None = None,
        activation_checkpointing: bool = False,
        kept_layers: int = 0,
        activation_offload: bool = False,
    ):
        super().__init__()
        self.student = student
        self.sequence = sequence or SequenceGroup()
        self.kept_layers = prepare_model(
            student,
            sequence=self.sequence,
            activation_checkpointing=activation_checkpointing,
            kept_layers=kept_layers,
            activation_offload=activation_offload,
        )

    def external_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        return [(self, self.student.lm_head.weight)]

    def words(self) -> int:
        return self.student.config.vocab_size

    def runs_alike(self) -> bool:
        return self.sequence.degree == 1 and self.kept_layers is None and self.separator is None

    def flops_per_token(self, seq_len: int) -> float:
        return next_token_flops(self.student, seq_len)

    @property
    def head(self) -> Tensor:
        """[V, D]. Without gradient where none is wanted: the losses make theirs in forward."""
        weight = self.student.lm_head.weight
        return weight if torch.is_grad_enabled() else weight.detach()

    def held_out(self, batch: Batch) -> dict[str, Tensor]:
        """What training logs, of a batch that it does not train on: means, the `cross_entropy` (nats) among them."""
        loss, values = type(self).forward(self, batch)  # that of the instance is the engine's
        return {"cross_entropy": loss} | values

    def states_and_labels(self, batch: Batch) -> tuple[Tensor, Tensor, float]:
        """What the loss needs of the N tokens of this rank's chunk.

        Returns:
            The final hidden states, [N, D]; the labels, [N]; and the number to divide a sum over the labels by, so that
            the mean over the ranks is the mean over all tokens.
        """
        rows = self.sequence.begin(batch.input_ids, batch.document_bounds)
        hidden = self.student.model(**self.sequence.arguments(self.student, batch.input_ids)).last_hidden_state
        sequences, tokens = batch.input_ids.shape
        count = sequences * (tokens - 1) / self.sequence.degree
        return hidden.flatten(0, 1), rows.of_chunk(batch.labels).flatten(), count


class Distillation(Headed):
    """Stage 2 (Sec. 4.4): the hybrid learns the teacher's distribution over every next token.

    Args:
        teacher: supplies the logits: this rank's own, or one on other ranks.
        temperature, cross_entropy: see `linear_kl`.
        options: those of every model with a head.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: TeacherSource,
        *,
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        **options: Any,
    ):
        super().__init__(student, **options)
        self.teacher = teacher
        self._terms: dict[str, Any] = {"temperature": temperature, "cross_entropy": cross_entropy}

    def flops_per_token(self, seq_len: int) -> float:
        assert self.teacher is not None
        return distill_flops(self.student, self.teacher.model, seq_len)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logs the KL, the teacher's entropy, top-1 agreement and the student's cross entropy; the others in nats."""
        assert batch.teacher_logits is not None
        hidden, labels, count = self.states_and_labels(batch)
        return linear_kl(hidden, self.head, batch.teacher_logits, labels=labels, label_count=count, **self._terms)


class NextToken(Headed):
    """Stage 3 (Sec. 4.5) and training from scratch: next-token cross entropy.

    Every target has the same weight, whatever its sequence, chunk or micro-batch: the sum is divided by the number of
    positions that can have a target, all but the last of each sequence.

    Args:
        separator: the token that ends a document, to isolate documents from each other. None: they see each other.
        options: those of every model with a head.
    """

    def __init__(self, student: PreTrainedModel, *, separator: int | None = None, **options: Any):
        super().__init__(student, **options)
        self.separator = separator

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, labels, count = self.states_and_labels(batch)
        return linear_cross_entropy(hidden, self.head, labels, count=count), {}
