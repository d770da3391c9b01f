"""What every mixer says of itself, and the registry. To add one: a file with a class under `@mixer(name)`, and its
import in modeling_hypenet.py."""

from collections.abc import Callable
from typing import ClassVar, Literal, TypeVar

from torch import Tensor, nn

from .configuration_hypenet import HypeNetConfig

SplitBy = Literal["states", "heads", "attention", "no"]
"""How ranks can share a sequence (halo/parallel/exchanges.py replaces a method of the mixer):

states: each rank keeps its tokens, and the states that they leave are added up. `recurrence` is `linear_attention`.
heads: each rank computes all tokens for a part of the heads, in `recurrence`.
attention: the same for softmax attention, in `attend`.
no: they cannot.
"""


class Mixer(nn.Module):
    """The facts that halo asks of a mixer. `@mixer` refuses a class that does not have them.

    Attributes:
        heads: H, the heads that mix tokens.
        split: how ranks can share a sequence.
    """

    heads: int
    split: ClassVar[SplitBy]

    def multiply_adds(self, seq_len: int) -> float:
        """Multiply-adds of one head for one token that mix it with the tokens before it, in a sequence of `seq_len`.

        With a state of fixed size: those with the state, of the equation as written. In softmax attention: those with
        the keys and values of the tokens that a token sees, on average. Projections are counted by their shapes.
        """
        raise NotImplementedError

    def first_values(self) -> dict[str, Tensor]:
        """What the mixer's own parameters begin at, by name; those of its modules are not among them.

        They are drawn and computed in float32, whatever dtype the model has.
        """
        return {}


Registered = TypeVar("Registered", bound=type[Mixer])

MIXERS: dict[str, type[Mixer]] = {}
"""What `mixer_types` may name. Filled by the files of the mixers, which modeling_hypenet.py imports."""


def mixer(name: str) -> Callable[[Registered], Registered]:
    """Register a class as the mixer `name`.

    Raises:
        TypeError: the class lacks a fact that `Mixer` names.
    """

    def register(cls: Registered) -> Registered:
        missing = [] if hasattr(cls, "split") else ["split"]
        if cls.multiply_adds is Mixer.multiply_adds:
            missing.append("multiply_adds")
        if missing:
            raise TypeError(f"{cls.__name__} lacks {' and '.join(missing)}: see hypenet.mixers.Mixer.")
        MIXERS[name] = cls
        return cls

    return register


def build_mixer(config: HypeNetConfig, layer_idx: int) -> Mixer:
    """The mixer that `config.mixer_types` names for layer `layer_idx`.

    Raises:
        ValueError: there is no mixer of that name, or it has no option that `config.mixer_options` sets.
    """
    name = config.mixer_types[layer_idx]
    if name not in MIXERS:
        raise ValueError(f"mixer_types[{layer_idx}] is {name!r}; there are {', '.join(sorted(MIXERS))}.")
    cls: Callable[[HypeNetConfig, int], Mixer] = MIXERS[name]
    return cls(config, layer_idx)
