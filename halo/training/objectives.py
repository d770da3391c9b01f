"""What each stage trains: a model and a loss."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo.distributed import world_size
from halo.losses.linear_kl import linear_kl
from halo.losses.squared_error import squared_error
from halo.parallel.exchanges import parallelize
from halo.parallel.prepare import prepare_model
from halo.parallel.sequence import SequenceGroup
from halo.teacher.colocated import Asked, Teacher
from halo.training.flops import align_flops, distill_flops, next_token_flops
from halo.training.look_ahead import Answer
from halo.training.trainer import Objective
from hypenet.losses import IGNORE, handed_out, linear_cross_entropy


class Alignment(Objective):
    """Stage 1 (Sec. 4.2): every RNN layer learns to give what its attention layer gives, on the teacher's states.

    Each layer's regression is done, with its gradients, as the teacher's forward passes the layer: the activations of
    one layer live at a time, however many there are.

    Args:
        mixers: layer index -> the RNN layer that may replace it.
        teacher: the frozen Transformer.
    """

    clip_apart = True  # the layers are regressions of their own

    def __init__(self, mixers: Mapping[int, nn.Module], teacher: Teacher):
        super().__init__()
        parallelize(mixers.values(), teacher.sequence)
        self.mixers = nn.ModuleDict({str(layer): mixer for layer, mixer in mixers.items()})
        self.regressions = nn.ModuleDict({name: _Regression(mixer) for name, mixer in self.mixers.items()})
        self._teacher = [teacher]  # in a list: not a submodule

    def external_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        return [(self.regressions[name], p) for name, mixer in self.mixers.items() for p in mixer.parameters()]

    def flops_per_token(self, seq_len: int) -> float:
        return align_flops(self.mixers.values(), self._teacher[0].model.model, seq_len)

    def forward(self, input_ids: Tensor, **taught: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the layers' losses (Eq. 7): each layer's gradient is its own.

        Logs each layer's loss in units of its target's mean square (1: no better than silence), and their mean.
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

        layers = self._teacher[0].layers
        handles = [
            layers[int(name)].get_submodule("self_attn").register_forward_hook(regress(name), with_kwargs=True)
            for name in self.mixers
        ]
        try:
            self._teacher[0].hidden_states(input_ids)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(list(losses.values())).sum(), {
            "relative": torch.stack(list(relative.values())).mean()
        } | relative


class _Regression(nn.Module):
    """One layer's loss, whose backward hands out gradients that forward has made."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self._mixer = [mixer]  # in a list: `Alignment.mixers` names its parameters

    def forward(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden and target [B, T, hidden] -> the mean squared error, and the target's mean square."""
        (mixer,) = self._mixer
        output, _ = mixer(hidden_states=hidden, position_embeddings=position_embeddings, attention_mask=None)
        loss, silence = squared_error(output, target)
        parameters = list(mixer.parameters())
        return _Made.apply(loss.detach(), torch.autograd.grad(loss, parameters), *parameters), silence


class _Made(torch.autograd.Function):
    """A loss whose gradients to `parameters` are made already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *handed_out(ctx, grad)


class _Headed(Objective):
    """A causal language model whose loss reads the head in place of applying it.

    Args:
        sequence: the ranks that share each sequence with this one: it trains on a chunk. None: there are none.
        activation_checkpointing, activation_offload: as halo/parallel/activations.py has them.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        *,
        sequence: SequenceGroup | None = None,
        activation_checkpointing: bool = False,
        activation_offload: bool = False,
    ):
        super().__init__()
        self.student = student
        self.sequence = sequence or SequenceGroup()
        prepare_model(
            student,
            sequence=self.sequence,
            activation_checkpointing=activation_checkpointing,
            activation_offload=activation_offload,
        )

    def external_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        return [(self, self.student.lm_head.weight)]

    def flops_per_token(self, seq_len: int) -> float:
        return next_token_flops(self.student, seq_len)

    def states_and_labels(self, input_ids: Tensor, bounds: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """[B, T] tokens -> of the N tokens of this rank's chunk the final hidden states, [N, D], and the next tokens,
        [N]; and what a sum over these is to be divided by, for the mean over the ranks to be that over all tokens.

        Args:
            bounds: [documents + 1] on the host, where packed documents begin in the B x T tokens, and the end.
        """
        labels = next_tokens(input_ids, bounds)
        rows = self.sequence.begin(input_ids, bounds)
        hidden = self.student.model(**self.sequence.arguments(self.student, input_ids)).last_hidden_state
        batch, tokens = input_ids.shape
        count = batch * (tokens - 1) / self.sequence.degree
        return hidden.flatten(0, 1), rows.of_chunk(labels).flatten(), count


class Distillation(_Headed):
    """Stage 2 (Sec. 4.4): the hybrid learns the teacher's distribution over every next token.

    Args:
        teacher: this rank's, or one on ranks of its own.
        temperature, cross_entropy: as `linear_kl` takes them.
        options: those of every model with a head.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Asked,
        *,
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        **options: Any,
    ):
        super().__init__(student, **options)
        self._teacher = [teacher]
        self._terms: dict[str, Any] = {"temperature": temperature, "cross_entropy": cross_entropy}

    def flops_per_token(self, seq_len: int) -> float:
        return distill_flops(self.student, self._teacher[0].model, seq_len)

    def ask(self, input_ids: Tensor) -> Answer:
        logits = self._teacher[0].ask(input_ids)
        return lambda: {"teacher": logits()}

    def ranks(self) -> int:
        return world_size() + self._teacher[0].ranks

    def forward(self, input_ids: Tensor, **taught: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Logs the KL, the teacher's entropy, top-1 agreement and the student's cross entropy, all in nats."""
        hidden, labels, count = self.states_and_labels(input_ids)
        head = self.student.lm_head.weight
        return linear_kl(hidden, head, taught["teacher"], labels=labels, label_count=count, **self._terms)


class NextToken(_Headed):
    """Stage 3 (Sec. 4.5) and training from scratch: next-token cross entropy.

    Every target weighs the same, in whichever row, chunk or micro-batch: their sum is divided by the places that can
    have one, all but the last of each row.

    Args:
        separator: the token that ends a document, where a token is to see its own document alone. None: it sees all
            that stands before it.
        options: those of every model with a head.
    """

    def __init__(self, student: PreTrainedModel, *, separator: int | None = None, **options: Any):
        super().__init__(student, **options)
        self._separator = separator

    def ask(self, input_ids: Tensor) -> Answer:
        """No teacher: where the documents begin, which is known on the host."""
        if self._separator is None:
            return super().ask(input_ids)
        bounds = document_bounds(input_ids, self._separator)
        return lambda: {"bounds": bounds}

    def forward(self, input_ids: Tensor, **taught: Any) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, labels, count = self.states_and_labels(input_ids, taught.get("bounds"))
        return linear_cross_entropy(hidden, self.student.lm_head.weight, labels, count=count), {}


def next_tokens(input_ids: Tensor, bounds: Tensor | None = None) -> Tensor:
    """[B, T] -> [B, T], the token after each; IGNORE after the last of a row, or of a document where they are apart."""
    labels = F.pad(input_ids[:, 1:], (0, 1), value=IGNORE)
    if bounds is not None:
        last = bounds[1:].long() - 1
        labels = labels.flatten().index_fill(0, last.to(labels.device), IGNORE).view_as(labels)
    return labels


def document_bounds(input_ids: Tensor, separator: int) -> Tensor:
    """[B, T] -> [documents + 1] in int32: where documents begin in the B x T tokens, which end with `separator` or with
    a row, and the end."""
    begins = torch.ones_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = input_ids[:, :-1] == separator
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([input_ids.numel()])]).int()
