"""Useful FLOPs a token, from the models' shapes: what a stage has to compute, whatever else is computed to get there.

    a weight of a matrix product   2 forward; trained, 2 for the weight's gradient and 2 for that of its input
    softmax attention              2 x 2 H D c forward, for q K^T and P V; trained, thrice. c is how many tokens a token
                                   sees, on average: T/2, less within a window
    a recurrence                   2 a multiply-add with the state, of the equation as it stands; trained, thrice

Recomputation does not count, nor what a chunked form of a recurrence adds. Lookups, norms, activations and losses are
left out: they are no matrix products. The head is in, the embedding is not, also where the two are tied.

Shapes are read from modules, not from weights: on the meta device, and under ZeRO-3, it comes to the same.

T tokens of a sequence, H heads, D their width.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from halo.models.fuse import window_of
from hypenet.mixer_deltanet import DeltaNet
from hypenet.mixer_gsa import GatedSlotAttention
from hypenet.mixer_rwkv7 import RWKV7
from hypenet.mixer_ttt import TTTLinear
from hypenet.rnn_mixer import RNNMixer


def forward_flops(model: nn.Module, seq_len: int) -> float:
    """FLOPs a token of a forward of `model`, or of any part of one, over sequences of `seq_len` tokens.

    Args:
        model: a causal language model with its head, its body alone, a layer, or a mixer; HypeNet's or a teacher's.
    """
    products = sum(2 * linear.in_features * linear.out_features for linear in _linears(model))
    return products + sum(sequence_flops(module, seq_len) for module in model.modules())


def sequence_flops(module: Any, seq_len: int) -> float:
    """FLOPs a token of what looks at other tokens: of an attention or a recurrence itself; 0 for other modules."""
    if isinstance(module, RNNMixer):
        return 2 * module.heads * _state_multiplications(module)
    if hasattr(module, "q_proj") and hasattr(module, "head_dim"):
        return 2 * 2 * module.get_submodule("q_proj").out_features * _tokens_seen(module, seq_len)
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


def _linears(model: nn.Module) -> Iterable[nn.Linear]:
    return (module for module in model.modules() if isinstance(module, nn.Linear))


def _reads_input(name: str, module: nn.Module, mixer: nn.Module) -> bool:
    """Whether `module` of a mixer is a projection of the layer's input, and not of something made from it."""
    is_linear = isinstance(module, nn.Linear) and module.in_features == mixer.get_submodule("q_proj").in_features
    return is_linear and name != "o_proj"


def _tokens_seen(attention: Any, seq_len: int) -> float:
    """How many tokens a token sees, on average: T/2, or in a window of w tokens w - w^2 / 2T."""
    window = window_of(attention)
    if window is None or window >= seq_len:
        return seq_len / 2
    return window - window**2 / (2 * seq_len)


def _state_multiplications(mixer: RNNMixer) -> int:
    """Multiply-adds with the state of a head, a token: writing k^T v and reading q S take D^2 each."""
    square = mixer.head_dim**2
    if isinstance(mixer, GatedSlotAttention):
        return 4 * mixer.head_dim * mixer.options.slots  # two states, [D, M] and [M, D]
    if isinstance(mixer, DeltaNet | TTTLinear):
        return 3 * square  # k is read before it is written
    if isinstance(mixer, RWKV7):
        return 4 * square  # what is read along a is written along b, beside k^T v
    return 2 * square
