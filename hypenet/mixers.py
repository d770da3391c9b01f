"""The registry of mixers. To add one: a module with the calling convention of `LightningAttention`, and a line here."""

from torch import nn

from .configuration_hypenet import ATTENTION, HypeNetConfig
from .mixer_attention import HypeNetAttention
from .mixer_lightning import LightningAttention

MIXERS: dict[str, type[nn.Module]] = {
    ATTENTION: HypeNetAttention,
    "lightning-attn": LightningAttention,
}


def build_mixer(config: HypeNetConfig, layer_idx: int) -> nn.Module:
    """The mixer that `config.mixer_types` names for layer `layer_idx`.

    Raises:
        ValueError: there is no mixer of that name.
    """
    name = config.mixer_types[layer_idx]
    if name not in MIXERS:
        raise ValueError(f"mixer_types[{layer_idx}] is {name!r}; there are {', '.join(MIXERS)}.")
    return MIXERS[name](config, layer_idx)
