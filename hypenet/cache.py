"""The hybrid cache: keys and values for attention layers, a state of fixed size for RNN layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx._pytree import register_pytree_flatten_spec
from torch.utils._pytree import Context, SequenceKey, register_pytree_node
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_hypenet import ATTENTION, SLIDING_WINDOW, HypeNetConfig
from .kernels import unvalued

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the cache in arguments and outputs: "cache" since 5.24. A forward takes both names."""

State = Tensor | tuple[Tensor, ...]
"""The state of an RNN layer between calls: one tensor or several, [B, ...] each."""


class StateLayer(CacheLayerMixin):
    """The cache of one RNN layer: its `state`, or None before the first token.

    It counts the tokens, since transformers asks any layer for the length of the cache.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.state: State | None = None
        self.length = 0
        self.is_initialized = False

    def advance(self, state: State, tokens: int) -> None:
        """Keep `state`, which follows `tokens` more tokens."""
        self.state = tuple(_own(x) for x in state) if isinstance(state, tuple) else _own(state)
        self.length += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
        """(length of the keys, offset of the first). transformers 4 passes the queries' positions, 5 their number."""
        return self.length + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._of_each(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._of_each(lambda x: x.repeat_interleave(repeats, dim=0))

    def _of_each(self, change: Callable[[Tensor], Tensor]) -> None:
        if isinstance(self.state, tuple):
            self.state = tuple(change(x) for x in self.state)
        elif self.state is not None:
            self.state = change(self.state)

    def crop(self, *_: Any) -> None:
        raise ValueError("The state of an RNN layer cannot be rolled back: it does not keep past tokens.")

    def lazy_initialization(self, *_: Any) -> None:
        """Nothing to prepare: the first state comes from the layer."""

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("An RNN layer keeps a state, not keys and values: use HypeNetCache.update_state.")


class WindowLayer(DynamicSlidingWindowLayer):
    """The cache of one sliding-window layer: the keys and values of the last `window` - 1 tokens."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys_and_values = super().update(key_states, *args, **kwargs)
        if key_states.shape[-2] > 1:  # else they are views of one token more
            self.keys, self.values = _own(self.keys), _own(self.values)
        return keys_and_values


class HypeNetCache(Cache):
    """One cache layer for each layer of a model, by its mixer."""

    layers: list[CacheLayerMixin]

    def __init__(self, config: HypeNetConfig) -> None:
        self.config = config
        super().__init__(layers=self._empty_layers())

    def state(self, layer_idx: int) -> State | None:
        """The state of RNN layer `layer_idx`, None before the first token."""
        return self._state_layer(layer_idx).state

    def update_state(self, state: State, layer_idx: int, tokens: int) -> None:
        """Keep the state of RNN layer `layer_idx` after `tokens` more tokens."""
        self._state_layer(layer_idx).advance(state, tokens)

    def reset(self) -> None:
        """Forget everything."""
        self.layers = self._empty_layers()

    def _empty_layers(self) -> list[CacheLayerMixin]:
        kinds = {ATTENTION: DynamicLayer, SLIDING_WINDOW: lambda: WindowLayer(self.config.sliding_window)}
        return [kinds.get(mixer, StateLayer)() for mixer in self.config.mixer_types]

    def _state_layer(self, layer_idx: int) -> StateLayer:
        layer = self.layers[layer_idx]
        assert isinstance(layer, StateLayer), f"layer {layer_idx} is an attention layer"
        return layer


def _flat(cache: HypeNetCache) -> tuple[list[Any], Context]:
    """The tensors of a cache for torch.export, layer by layer. A length is the length of an empty tensor: so it can be
    left open."""
    layers: list[Any] = []
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            layers.append((layer.state, torch.empty(layer.length, 0)))
        elif layer.is_initialized:
            layers.append((layer.keys, layer.values, torch.empty(getattr(layer, "cumulative_length", 0), 0)))
        else:
            layers.append(None)
    return layers, cache.config


def _unflat(layers: Any, config: Context) -> HypeNetCache:
    cache = HypeNetCache(config)
    for layer, held in zip(cache.layers, layers, strict=True):
        if held is None:
            continue
        if isinstance(layer, StateLayer):
            (layer.state, counted), layer.is_initialized = held, held[0] is not None
            layer.length = counted.shape[0]
            continue
        keys, values, counted = held
        layer.update(keys, values)
        layer.keys, layer.values = keys, values
        if isinstance(layer, WindowLayer):
            layer.cumulative_length = counted.shape[0]
    return cache


def _named(cache: HypeNetCache) -> tuple[list[tuple[Any, Any]], Context]:
    layers, config = _flat(cache)
    return [(SequenceKey(i), layer) for i, layer in enumerate(layers)], config


register_pytree_node(HypeNetCache, _flat, _unflat, flatten_with_keys_fn=_named)
register_pytree_flatten_spec(HypeNetCache, lambda cache, spec: _flat(cache)[0])


def the_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache, by whichever of its names it was given, or None.

    Raises:
        ValueError: there are two.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("Give the cache as past_key_values or as cache, not both.")
    return cache if past_key_values is None else past_key_values


def _own(x: Tensor) -> Tensor:
    """x with its own memory: a view would keep the whole tensor alive."""
    if unvalued(x):  # what memory it will have is not known
        return x.clone()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
