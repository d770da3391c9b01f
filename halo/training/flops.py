"""Useful FLOPs a token, from the models' shapes: what a stage has to compute, whatever else is computed to get there.

    a weight of a matrix product   2 forward; trained, 2 for the weight's gradient and 2 for that of its input
    softmax attention              2 x 2 H D c forward, for q K^T and P V; trained, three times that. c is the number of
                                   tokens that a token sees, on average: T/2, less within a window
    a recurrence                   2 a multiply-add with the state, of the equation as written; trained, three times

A mixer says the last two itself (`hypenet.mixers.Mixer.multiply_adds`). Recomputation does not count, nor what a
chunked form of a recurrence adds. Lookups, norms, activations and losses are left out: they are no matrix products. The
head counts, the embedding does not, also if the two are tied.

Shapes are read from modules, not from weights: the result is the same on the meta device and under ZeRO-3.

T tokens of a sequence, H heads, D their width.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from halo.models.families import window_of
from halo.teacher.fp8 import Fp8Linear
from hypenet.mixer_attention import tokens_seen
from hypenet.mixers import Mixer


def forward_flops(model: nn.Module, seq_len: int) -> float:
    """FLOPs a token of a forward of `model`, or of any part of one, over sequences of `seq_len` tokens.

    Args:
        model: a causal language model with its head, its body alone, a layer, or a mixer; HypeNet's or a teacher's.
    """
    products = sum(2 * linear.in_features * linear.out_features for linear in _linears(model))
    return products + sum(sequence_flops(module, seq_len) for module in model.modules())


def sequence_flops(module: Any, seq_len: int) -> float:
    """FLOPs a token of what mixes tokens: of a mixer's recurrence or attention alone; 0 for other modules."""
    if isinstance(module, Mixer):
        return 2 * module.heads * module.multiply_adds(seq_len)
    if hasattr(module, "q_proj") and hasattr(module, "head_dim"):  # a teacher's attention
        return 2 * 2 * module.get_submodule("q_proj").out_features * tokens_seen(seq_len, window_of(module))
    return 0.0


def next_token_flops(model: nn.Module, seq_len: int) -> float:
    """FLOPs a token of stage 3, and of training from scratch."""
    return 3 * forward_flops(model, seq_len)


def distill_flops(student: nn.Module, teacher: nn.Module, seq_len: int) -> float:
    """FLOPs a token of stage 2: the student trained, the teacher forward, a head for each."""
    return 3 * forward_flops(student, seq_len) + forward_flops(teacher, seq_len)


def align_flops(mixers: Iterable[nn.Module], teacher_body: nn.Module, seq_len: int) -> float:
    """FLOPs a token of stage 1: every mixer trained, the teacher forward without its head.

    A mixer's input is the frozen teacher's, and has no gradient: the projections that read it take 4 a weight, not 6.
    """
    total = forward_flops(teacher_body, seq_len)
    for mixer in mixers:
        inputs = [linear for name, linear in mixer.named_modules() if _reads_input(name, linear, mixer)]
        total += 3 * forward_flops(mixer, seq_len) - sum(2 * x.in_features * x.out_features for x in inputs)
    return total


def _linears(model: nn.Module) -> Iterable[nn.Linear | Fp8Linear]:
    return (module for module in model.modules() if isinstance(module, nn.Linear | Fp8Linear))


def _reads_input(name: str, module: nn.Module, mixer: nn.Module) -> bool:
    """Whether `module` of a mixer projects the layer's input, not something made from it."""
    is_linear = isinstance(module, nn.Linear) and module.in_features == mixer.get_submodule("q_proj").in_features
    return is_linear and name != "o_proj"
