"""The registry of mixers. To add one: a file with a class under `@mixer(name)`, imported in modeling_hypenet.py."""

from collections.abc import Callable

from torch import nn

from .configuration_hypenet import HypeNetConfig

MIXERS: dict[str, type[nn.Module]] = {}
"""What `mixer_types` may name. Filled by the files of the mixers, which modeling_hypenet.py imports."""


def mixer(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a class as the mixer `name`."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        MIXERS[name] = cls
        return cls

    return register


def build_mixer(config: HypeNetConfig, layer_idx: int) -> nn.Module:
    """The mixer that `config.mixer_types` names for layer `layer_idx`.

    Raises:
        ValueError: there is no mixer of that name, or it has no option that `config.mixer_options` sets.
    """
    name = config.mixer_types[layer_idx]
    if name not in MIXERS:
        raise ValueError(f"mixer_types[{layer_idx}] is {name!r}; there are {', '.join(sorted(MIXERS))}.")
    return MIXERS[name](config, layer_idx)
