"""The configuration of a HypeNet model: Qwen3's, and the mixer of each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from .rope import LISTS, installed_rope, read_rope

ATTENTION = "attn"
SLIDING_WINDOW = "swa"
LIGHTNING = "lightning-attn"
WINDOW = 512
"""The window of sliding-window attention, unless `mixer_options` sets another (Table 13)."""

QWEN3_KV_HEADS = 32
"""What Qwen3 has by default; of no use to heads that it does not divide."""

Options = TypeVar("Options")


def hype_scaling(base: float) -> str:
    """The `attn_logits_scaling` of Eq. 11 with base a, e.g. "hype 500"."""
    return f"hype {base:.12g}"


def read_scaling(spec: str | float) -> tuple[str, float]:
    """An `attn_logits_scaling` that is not None: ("hype", a) or ("constant", s).

    Raises:
        ValueError: it is neither a positive number nor "hype a" with a > 1.
    """
    if isinstance(spec, int | float) and not isinstance(spec, bool) and spec > 0:
        return "constant", float(spec)
    name, _, base = spec.partition(" ") if isinstance(spec, str) else ("", "", "")
    try:
        a = float(base)
    except ValueError:
        a = 0.0
    if name != "hype" or not a > 1:
        raise ValueError(f"attn_logits_scaling must be None, a positive number, or 'hype a' with a > 1, not {spec!r}.")
    return name, a


class HypeNetConfig(Qwen3Config):
    """Qwen3's keys, and those of the published HypeNet checkpoints.

    Attributes:
        mixer_types: one name of `MIXERS` a layer, e.g. "attn" or "lightning-attn". None: "attn" everywhere.
        mixer_options: the options of a mixer, by its name, that differ from its defaults, e.g.
            {"gla": {"use_rope": False}}. Lightning has the keys of the published configurations instead.
        attn_use_rope: RoPE in attention layers. HyPE has none there (paper Sec. 5.1).
        attn_use_qk_norm: QK-norm in attention layers. Off if the teacher had none.
        attn_qkv_bias, attn_o_bias: biases of the projections, in every mixer, if the teacher had them.
        attn_use_output_gate: the sigmoid gate of Eq. 17, on the attention output itself.
        attn_logits_scaling: Eq. 11, in evaluation only. None: no scaling. "hype 500": s_t = log_a(t + a), a = 500. A
            number: that constant.
        expand_kv_proj: RNN layers have a key and value head for every query head (Eq. 13).
        lightning_use_rope, lightning_use_qk_norm, lightning_use_output_norm, lightning_use_output_gate:
            the parts of Eq. 18.
        lightning_nh, lightning_nkv, lightning_head_dim: heads, key and value heads, and their width in RNN
            layers. None: as in the attention layers, after `expand_kv_proj`.
        lightning_scale: only "1/sqrt(d)".
        lightning_use_short_conv: only False; published configurations have the key.
        logits_in_training: labels give the logits in training too, for a trainer that reads them, such as TRL's. They
            take [tokens, vocabulary] in memory, which the loss alone does not.
    """

    model_type = "hypenet"
    base_model_tp_plan = None  # Qwen3's would split the heads that `o_norm` norms together

    def __init__(
        self,
        *,
        mixer_types: Sequence[str] | None = None,
        mixer_options: Mapping[str, Mapping[str, Any]] | None = None,
        attn_use_rope: bool = False,
        attn_use_qk_norm: bool = True,
        attn_qkv_bias: bool = False,
        attn_o_bias: bool = False,
        attn_use_output_gate: bool = True,
        attn_logits_scaling: str | float | None = None,
        expand_kv_proj: bool = True,
        lightning_use_rope: bool = True,
        lightning_use_qk_norm: bool = True,
        lightning_use_output_norm: bool = True,
        lightning_use_output_gate: bool = True,
        lightning_nh: int | None = None,
        lightning_nkv: int | None = None,
        lightning_head_dim: int | None = None,
        lightning_scale: str = "1/sqrt(d)",
        lightning_use_short_conv: bool = False,
        logits_in_training: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("layer_types", None)  # a view of mixer_types, below
        heads = kwargs.get("num_attention_heads", QWEN3_KV_HEADS)
        if heads % QWEN3_KV_HEADS:
            kwargs.setdefault("num_key_value_heads", heads)
        super().__init__(**installed_rope(kwargs))
        self.mixer_types = list(mixer_types) if mixer_types is not None else [ATTENTION] * self.num_hidden_layers
        # transformers' masks and caches read these.
        kinds = {ATTENTION: "full_attention", SLIDING_WINDOW: "sliding_attention"}
        self.layer_types = [kinds.get(mixer, "linear_attention") for mixer in self.mixer_types]
        self.mixer_options = {name: dict(options) for name, options in (mixer_options or {}).items()}
        if SLIDING_WINDOW in self.mixer_types:
            self.sliding_window = self.mixer_options.get(SLIDING_WINDOW, {}).get("window", WINDOW)
        self.attn_use_rope = attn_use_rope
        self.attn_use_qk_norm = attn_use_qk_norm
        self.attn_qkv_bias = attn_qkv_bias
        self.attn_o_bias = attn_o_bias
        self.attn_use_output_gate = attn_use_output_gate
        self.attn_logits_scaling = attn_logits_scaling
        self.expand_kv_proj = expand_kv_proj
        self.lightning_use_rope = lightning_use_rope
        self.lightning_use_qk_norm = lightning_use_qk_norm
        self.lightning_use_output_norm = lightning_use_output_norm
        self.lightning_use_output_gate = lightning_use_output_gate
        self.lightning_nh = lightning_nh or self.num_attention_heads
        self.lightning_nkv = lightning_nkv or (self.lightning_nh if expand_kv_proj else self.num_key_value_heads)
        self.lightning_head_dim = lightning_head_dim or self.head_dim
        self.lightning_scale = lightning_scale
        self.lightning_use_short_conv = lightning_use_short_conv
        self.logits_in_training = logits_in_training
        self._check()

    def options_of(self, mixer: str, options: type[Options]) -> Options:
        """The options of a mixer: the defaults of the dataclass `options`, and the values set here.

        Raises:
            ValueError: an option that the mixer does not have, or a wrong value.
        """
        known = {field.name for field in fields(options)}  # type: ignore[arg-type]
        given = self._lightning_options() if mixer == LIGHTNING else self.mixer_options.get(mixer, {})
        if unknown := given.keys() - known:
            raise ValueError(
                f"mixer_options[{mixer!r}] has no {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}."
            )
        return options(**given)

    def _lightning_options(self) -> dict[str, Any]:
        return {
            "heads": self.lightning_nh,
            "kv_heads": self.lightning_nkv,
            "head_dim": self.lightning_head_dim,
            "use_rope": self.lightning_use_rope,
            "qk_norm": "rms" if self.lightning_use_qk_norm else None,
            "use_output_norm": self.lightning_use_output_norm,
            "use_output_gate": self.lightning_use_output_gate,
        }

    def _check(self) -> None:
        if len(self.mixer_types) != self.num_hidden_layers:
            raise ValueError(
                f"mixer_types names {len(self.mixer_types)} mixers, but num_hidden_layers is {self.num_hidden_layers}."
            )
        for mixer, keys in ((LIGHTNING, "lightning_*"), (ATTENTION, "attn_*")):
            if mixer in self.mixer_options:
                raise ValueError(f"The options of {mixer!r} are the {keys} keys: take it out of mixer_options.")
        if unused := self.mixer_options.keys() - set(self.mixer_types):
            raise ValueError(f"mixer_options names {', '.join(sorted(unused))}, which no layer of mixer_types has.")
        if self.attn_logits_scaling is not None:
            read_scaling(self.attn_logits_scaling)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        switches = (
            "lightning_use_rope",
            "lightning_use_qk_norm",
            "lightning_use_output_norm",
            "lightning_use_output_gate",
        )
        off = [name for name in switches if not getattr(self, name)]
        if off and LIGHTNING not in self.mixer_types:
            raise ValueError(f"{', '.join(off)} without a Lightning layer: set mixer_options of the mixers there are.")
        if not self.expand_kv_proj and self.lightning_nkv != self.num_key_value_heads:
            raise ValueError(
                f"expand_kv_proj is False, but lightning_nkv is {self.lightning_nkv} and not num_key_value_heads, "
                f"{self.num_key_value_heads}: leave lightning_nkv out."
            )
        rope = read_rope(vars(self))
        if any(len(rope[name]) != self.head_dim // 2 for name in LISTS if name in rope):
            raise ValueError(f"RoPE's {' and '.join(LISTS)} must have head_dim / 2 = {self.head_dim // 2} values each.")
        if getattr(self, "lightning_rope_scaling", None):
            raise ValueError("lightning_rope_scaling must be null: RNN layers have the RoPE that the model has.")
        if self.lightning_nh % self.lightning_nkv:
            raise ValueError(f"lightning_nh {self.lightning_nh} is no multiple of lightning_nkv {self.lightning_nkv}.")
        if self.lightning_scale != "1/sqrt(d)":
            raise ValueError(f"lightning_scale must be '1/sqrt(d)', not {self.lightning_scale!r}.")
        if self.lightning_use_short_conv:
            raise ValueError("lightning_use_short_conv must be False: HypeNet has no short convolutions (App. D).")
        if self.attention_bias:
            raise ValueError("attention_bias must be False: HypeNet's keys are attn_qkv_bias and attn_o_bias.")
        if self.use_sliding_window:
            raise ValueError("use_sliding_window must be False: HypeNet's attention layers see the whole context.")
