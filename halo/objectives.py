"""What each stage trains: a model and a loss."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo.distributed import world_size
from halo.flops import align_flops, distill_flops, next_token_flops
from halo.linear_kl import linear_kl
from halo.look_ahead import Answer
from halo.models import unpadded
from halo.squared_error import squared_error
from halo.teacher import Asked, Teacher
from halo.trainer import Objective
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
    """A causal language model whose loss reads the head in place of applying it."""

    def __init__(self, student: PreTrainedModel, *, activation_checkpointing: bool = False):
        super().__init__()
        self.student = student
        if activation_checkpointing:
            # Reentrant: the other kind compares what backward recomputes with what ZeRO-3 had gathered in forward.
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})

    def external_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        return [(self, self.student.lm_head.weight)]

    def flops_per_token(self, seq_len: int) -> float:
        return next_token_flops(self.student, seq_len)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]."""
        return self.student.model(**unpadded(self.student, input_ids)).last_hidden_state


class Distillation(_Headed):
    """Stage 2 (Sec. 4.4): the hybrid learns the teacher's distribution over every next token.

    Args:
        teacher: this rank's, or one on ranks of its own.
        temperature, cross_entropy: as `linear_kl` takes them.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Asked,
        *,
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        activation_checkpointing: bool = False,
    ):
        super().__init__(student, activation_checkpointing=activation_checkpointing)
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
        hidden = self.hidden_states(input_ids).flatten(0, 1)
        head = self.student.lm_head.weight
        return linear_kl(hidden, head, taught["teacher"], labels=next_tokens(input_ids), **self._terms)


class NextToken(_Headed):
    """Stage 3 (Sec. 4.5) and training from scratch: next-token cross entropy."""

    def forward(self, input_ids: Tensor, **taught: Any) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.hidden_states(input_ids).flatten(0, 1)
        return linear_cross_entropy(hidden, self.student.lm_head.weight, next_tokens(input_ids)), {}


def next_tokens(input_ids: Tensor) -> Tensor:
    """[B, T] -> [B * T], the token after each; IGNORE after the last of a row."""
    return F.pad(input_ids[:, 1:], (0, 1), value=IGNORE).flatten()
