"""What the RNN mixers share: projections, QK-norm, RoPE, padding and packing, the cache, output norm and gate (Eq. 18).

    q_t, k_t, v_t = heads of x_t W_q, x_t W_k, x_t W_v      then activation, norm and RoPE as the options say
    o_t           = the mixer's recurrence                  `RNNMixer.recur`, all that a mixer has to write
    y_t           = (Norm(o_t) * sigmoid(x_t W_z)) W_o

Shapes: B batch, T tokens, H heads, D their width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from .cache import HypeNetCache, State, the_cache
from .configuration_hypenet import HypeNetConfig
from .fused import Rope, gated, projections, turn
from .linear_attention import linear_attention, widen, without_autocast
from .mixers import Mixer
from .norm import HeadNorm, OutputNorm


@dataclass(frozen=True, kw_only=True)
class RNNOptions:
    """The options of every RNN mixer; a mixer's own defaults follow Table 15.

    Attributes:
        heads, kv_heads, head_dim: None: as in the attention layers, after `expand_kv_proj` (Eq. 13).
        use_rope: RoPE on queries and keys, half of HyPE (Sec. 5.1).
        qk_norm: "rms" (Eq. 12), "l2" (to length one, without weights) or None.
        activation: the activation of queries, keys and values before the norm, e.g. "silu", or None.
        use_output_norm, use_output_gate: the parts of Eq. 14.
    """

    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    use_rope: bool = True
    qk_norm: str | None = "rms"
    activation: str | None = None
    use_output_norm: bool = True
    use_output_gate: bool = True

    def __post_init__(self) -> None:
        if self.qk_norm not in ("rms", "l2", None):
            raise ValueError(f"qk_norm must be 'rms', 'l2' or None, not {self.qk_norm!r}.")
        if self.activation is not None and self.activation not in ACT2FN:
            raise ValueError(f"activation must be None or a name in transformers' ACT2FN, not {self.activation!r}.")


class RNNMixer(Mixer):
    """An RNN layer without its recurrence. `z_proj` makes the gate, `o_norm` is one norm over all heads together.

    A class that sets `recurrence` must also set `split` and `multiply_adds`: they are facts of the recurrence.

    Raises:
        TypeError: at the definition of a class that sets `recurrence` alone, or that learns its first state although
            ranks exchange states, which begin with zeros.
    """

    Options: ClassVar[type[RNNOptions]] = RNNOptions
    recurrence: Callable[..., tuple[Tensor, Any]]
    """The part of `recur` that mixes tokens. Heads must not interact: sequence parallelism splits over them.

    Positional arguments: q, k, v and all else that is by token, [B, T, H, ...]; then what is by head, [H, ...]; any may
    be None. Keywords: `state`, [B, H, ...], `keep_state`, `cu_seqlens`, and options. Everything else that `recur` does
    is token by token. Autocast is off in it, and q, k and v have autocast's dtype."""

    before_rope: Callable[..., tuple[Tensor, Tensor, Tensor | None]] | None = None
    """A method (q, k) -> (q, k, gates) of mixers that change queries or keys between norm and RoPE: [B, T, heads, D]
    each. `gates`, [B, T, KV heads, ...] or None, are made from those keys; `recur` gets them by that name. None, as in
    most mixers: nothing happens there, and norm and RoPE are one kernel."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "recurrence" in vars(cls):
            missing = [name for name in ("split", "multiply_adds") if name not in vars(cls)]
            if missing:
                raise TypeError(
                    f"{cls.__name__} sets recurrence without {' and '.join(missing)}: see hypenet.mixers.Mixer."
                )
            cls.recurrence = staticmethod(without_autocast(cls.recurrence))
        if getattr(cls, "split", "no") == "states" and cls.first_state is not RNNMixer.first_state:
            raise TypeError(f'{cls.__name__} learns its first state: set split to "heads" or "no".')

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.options = options = config.options_of(config.mixer_types[layer_idx], self.Options)
        self.heads = options.heads or config.num_attention_heads
        kv_heads = options.kv_heads or (self.heads if config.expand_kv_proj else config.num_key_value_heads)
        self.head_dim = options.head_dim or config.head_dim
        if self.heads % kv_heads:
            raise ValueError(
                f"Layer {layer_idx}: {self.heads} heads are no multiple of {kv_heads} key and value heads."
            )
        if options.use_rope and self.head_dim != config.head_dim:
            raise ValueError(
                f"Layer {layer_idx}: RoPE is made for heads of {config.head_dim}, not of {self.head_dim}: "
                "leave RoPE out of this mixer, or leave its head_dim alone."
            )
        self.queries_per_key = self.heads // kv_heads
        self.scaling = self.head_dim**-0.5
        width, kv_width = self.heads * self.head_dim, kv_heads * self.head_dim

        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attn_qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attn_qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attn_qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attn_o_bias)
        self.q_norm = self.k_norm = self.o_norm = None
        self.z_proj: nn.Module | None = None
        if options.qk_norm == "rms":
            self.q_norm = HeadNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = HeadNorm(self.head_dim, eps=config.rms_norm_eps)
        if options.use_output_norm:
            self.o_norm = OutputNorm(width, eps=config.rms_norm_eps)
        if options.use_output_gate:
            self.z_proj = nn.Linear(config.hidden_size, width, bias=False)
        for name, value in self.first_values().items():
            self.register_parameter(name, nn.Parameter(value.to(self.q_proj.weight.dtype)))

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden_states: Tensor,
        tokens: Tensor | None,
        *,
        gates: Tensor | None = None,
        state: State | None,
        keep_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, State | None]:
        """Gates from the layer's input, and the recurrence over a sequence.

        Products of gates follow autocast, as all of the model's do: weights may be stored in a dtype that computes
        nothing.

        Args:
            q, k, v: [B, T, H, D], normed and rotated; k and v are zero at padding.
            hidden_states: [B, T, hidden], the layer's input, zero at padding.
            tokens: [B, T], true at tokens and false at padding, or None: no padding.
            gates: [B, T, KV heads, ...], zero at padding: those of `before_rope`; given only if it makes any.
            state: the state that the last call returned; at the beginning `first_state`'s.
            keep_state: whether to return the state after the last token.
            cu_seqlens: [documents + 1], where packed documents begin and the last one ends; then B is 1.

        Returns:
            The output [B, T, H, D], and the state if `keep_state`, else None.
        """
        raise NotImplementedError

    def first_state(self, q: Tensor, batch: int) -> State | None:
        """The state before the first token of `batch` rows or documents, where it is learnt. None: zeros.

        Args:
            q: [B, T, H, D], for its dtype and device.
        """
        return None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: Cache | None = None,
        rows_apart: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Qwen3Attention's convention, save for the mask.

        Args:
            hidden_states: [B, T, hidden].
            position_embeddings: RoPE's cos and sin, [B, T, D] each.
            attention_mask: [B, T], 1 at tokens and 0 at padding, or None. In place of a teacher's attention also
                that attention's [B, 1, T, T].
            past_key_values, cache: two names of one argument, a `HypeNetCache` to continue from and to update.
            cu_seq_lens_q: [documents + 1] in int32, the bounds of documents packed into the B x T tokens.
            rows_apart: the mask has padding after tokens, and the state must pass over it.

        Returns:
            The output, [B, T, hidden], and None in place of attention weights.

        Raises:
            ValueError: the cache is not a `HypeNetCache`.
        """
        cache = the_cache(past_key_values, cache)
        if cache is not None and not isinstance(cache, HypeNetCache):
            raise ValueError(f"RNN layer {self.layer_idx} needs a HypeNetCache: give one, or pass use_cache=False.")

        rope = position_embeddings if self.options.use_rope else None
        q, k, v, z = self.project(hidden_states)
        q, k, gates = self.turned(q, k, rope)
        if self.queries_per_key > 1:
            k, v = (x.repeat_interleave(self.queries_per_key, dim=2) for x in (k, v))
        tokens, inputs = None, hidden_states
        if attention_mask is not None:  # padding leaves no trace in the state
            tokens = _tokens(attention_mask)
            k, v, inputs = (_zero_at_padding(x, tokens) for x in (k, v, inputs))
            gates = None if gates is None else _zero_at_padding(gates, tokens)

        device = q.device.type
        if torch.is_autocast_enabled(device):
            q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
        apart = tokens if rows_apart else None
        output, state = self._recur(q, k, v, inputs, tokens, gates, cache, cu_seq_lens_q, apart)
        if cache is not None and state is not None:
            cache.update_state(state, self.layer_idx, hidden_states.shape[1])

        return self.o_proj(self.norm_and_gate(output.flatten(2), z)), None

    def _recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden_states: Tensor,
        tokens: Tensor | None,
        gates: Tensor | None,
        cache: HypeNetCache | None,
        cu_seqlens: Tensor | None,
        apart: Tensor | None,
    ) -> tuple[Tensor, State | None]:
        """`recur` of rows, from the cache's state if there is one, or of packed documents as one row."""
        of_keys: dict[str, Any] = {} if gates is None else {"gates": gates}
        if cu_seqlens is not None:
            of_keys = {name: x.flatten(0, 1)[None] for name, x in of_keys.items()}
            q_, k_, v_, hidden_states = (x.flatten(0, 1)[None] for x in (q, k, v, hidden_states))
            first = self.first_state(q_, len(cu_seqlens) - 1)
            output, _ = self.recur(
                q_, k_, v_, hidden_states, None, **of_keys, state=first, keep_state=False, cu_seqlens=cu_seqlens
            )
            return output.view_as(q), None
        keep = cache is not None
        state = None if cache is None else cache.state(self.layer_idx)
        if state is None:
            state = self.first_state(q, q.shape[0])
        if apart is not None:
            return self._recur_at(apart, q, k, v, hidden_states, of_keys, state)
        return self.recur(q, k, v, hidden_states, tokens, **of_keys, state=state, keep_state=keep, cu_seqlens=None)

    def _recur_at(
        self,
        tokens: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden_states: Tensor,
        of_keys: dict[str, Tensor],
        state: State | None,
    ) -> tuple[Tensor, State | None]:
        """`recur` of the tokens alone, each row's packed as a document: padding among them leaves the state as it is.

        Args:
            tokens: [B, T], true at tokens.

        Returns:
            The output, [B, T, H, D], zero at padding, and the state after each row's last token.
        """
        at, lengths = tokens.flatten().nonzero().flatten(), tokens.sum(1)
        rows = lengths.nonzero().flatten()  # a row may have no token
        cu_seqlens = F.pad(lengths[rows].cumsum(0), (1, 0)).int()
        q_, k_, v_, hidden_states = (x.flatten(0, 1)[at][None] for x in (q, k, v, hidden_states))
        of_keys = {name: x.flatten(0, 1)[at][None] for name, x in of_keys.items()}
        begun = tree_map_only(Tensor, lambda x: x[rows.to(x.device)], state)
        output, ended = self.recur(
            q_, k_, v_, hidden_states, None, **of_keys, state=begun, keep_state=True, cu_seqlens=cu_seqlens
        )
        if state is None:
            state = tree_map_only(Tensor, lambda x: x.new_zeros(len(tokens), *x.shape[1:]), ended)
        state = tree_map(lambda x, new: x.index_copy(0, rows.to(x.device), new.to(x.dtype)), state, ended)
        return torch.zeros_like(q).flatten(0, 1).index_copy(0, at, output[0]).view_as(q), state

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values, [B, T, heads, D] each, and z = x W_z, [B, T, H * D], if there is an output gate."""
        q, k, v, z = projections(hidden_states, self.q_proj, self.k_proj, self.v_proj, self.z_proj)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (x.view(shape) for x in (q, k, v))
        if self.options.activation is not None:
            q, k, v = (ACT2FN[self.options.activation](x) for x in (q, k, v))
        return q, k, v, z

    def turned(self, q: Tensor, k: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and keys as `recur` takes them, [B, T, heads, D] each, and the gates of `before_rope`."""
        if self.before_rope is None and self.q_norm is not None and self.k_norm is not None:
            return self.q_norm(q, rope), self.k_norm(k, rope), None
        q, k = self.normed(q, k)
        gates = None
        if self.before_rope is not None:
            q, k, gates = self.before_rope(q, k)
        return turn(q, None, 0.0, rope), turn(k, None, 0.0, rope), gates

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after the norm, before `before_rope` and RoPE: [B, T, heads, D] each."""
        if self.q_norm is not None and self.k_norm is not None:
            return self.q_norm(q), self.k_norm(k)
        if self.options.qk_norm == "l2":
            q, k = (F.normalize(widen(x), dim=-1, eps=1e-6).to(x.dtype) for x in (q, k))
        return q, k

    def norm_and_gate(self, output: Tensor, z: Tensor | None) -> Tensor:
        """The output norm and gate of Eq. 14, if the options have them, [B, T, H * D].

        Args:
            z: as `project` has it.
        """
        if self.o_norm is not None:
            return self.o_norm(output, z)
        return output if z is None else gated(output, None, 0.0, z)


class OuterProductMixer(RNNMixer):
    """An RNN layer whose state is a decayed sum of outer products (hypenet/linear_attention.py).

    A mixer that derives from it writes `recur`, and there calls `self.recurrence(q, k, v, log_decay, ...)`.
    """

    recurrence = staticmethod(linear_attention)
    split = "states"

    def multiply_adds(self, seq_len: int) -> float:
        """D^2 to add k^T v, D^2 to read q S."""
        return 2 * self.head_dim**2


def _zero_at_padding(x: Tensor, tokens: Tensor) -> Tensor:
    """x, [B, T, ...], zero where `tokens`, [B, T], is false."""
    return x.masked_fill(~tokens.view(*tokens.shape, *[1] * (x.ndim - 2)), 0)


def _tokens(mask: Tensor) -> Tensor:
    """[B, T], true at tokens: the padding mask itself, or whether an attention mask lets each see itself."""
    if mask.ndim == 4:
        mask = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return mask if mask.dtype == torch.bool else mask == 0  # else it is added to the logits
    return mask.bool()
