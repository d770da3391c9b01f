"""RoPE as a configuration states it: read from either spelling, and written for the installed transformers.

transformers 4 reads `rope_theta`, `rope_scaling` and, for longrope, `original_max_position_embeddings`; 5 writes one
`rope_parameters`, and 4 ignores it. Both are read here into one form, `rope_parameters` with every value stated, so
that a model computes the same on each.
"""

import math
from collections.abc import Mapping
from typing import Any

import transformers

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""RoPE's variants, which HypeNet computes as transformers does."""
ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Those whose frequencies depend on the length of the sequence."""

THETA = 10_000.0
"""Where a configuration states none, in either version of transformers."""
ORIGINAL = "original_max_position_embeddings"
LISTS = ("short_factor", "long_factor")

_LENGTH = "max_position_embeddings"
_PARTIAL = "partial_rotary_factor"
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", ORIGINAL, _PARTIAL)
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": LISTS,
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
_WITHOUT_EFFECT = ("finetuned",)  # in the configurations of YaRN's authors; transformers never read it


def reads_rope_parameters() -> bool:
    """Whether the installed transformers does; else it reads the keys of transformers 4."""
    return not transformers.__version__.startswith("4.")


def installed_rope(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration, with RoPE as the installed transformers reads it.

    Raises:
        ValueError: as `read_rope`.
    """
    rope = read_rope(keys)
    others = {name: value for name, value in keys.items() if name not in _ROPE_KEYS}
    if reads_rope_parameters():
        return others | {"rope_parameters": rope}
    theta, scaling = rope["rope_theta"], {name: value for name, value in rope.items() if name != "rope_theta"}
    if rope["rope_type"] == "longrope":
        others[ORIGINAL] = rope[ORIGINAL]
    return others | {"rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else scaling}


def is_misread(config: Any) -> bool:
    """Whether the installed transformers computes another RoPE than the configuration object `config` states."""
    if reads_rope_parameters():
        return False
    scaling = getattr(config, "rope_scaling", None) or {}
    elsewhere = scaling.get("rope_type") == "longrope" and ORIGINAL in scaling and not hasattr(config, ORIGINAL)
    return bool(getattr(config, "rope_parameters", None)) or elsewhere


def read_rope(keys: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE from the keys of a configuration, as a `rope_parameters` that states each value that matters.

    Raises:
        ValueError: a key is stated twice with different values, is missing, wrong or unknown, or there is no such
            variant.
    """
    stated = _stated(keys)
    kind = stated.pop("rope_type", None)
    if kind is None and stated.keys() & {"factor", *LISTS}:
        raise ValueError("RoPE is scaled without a rope_type: add it to the configuration.")
    kind = kind or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"The RoPE is of type {kind!r}; supported: {', '.join(ROPE_TYPES)}.")
    theta, original = stated.pop("rope_theta", THETA), stated.pop(ORIGINAL, None)
    allowed = _REQUIRED[kind] + _OPTIONAL.get(kind, ())
    if missing := [name for name in _REQUIRED[kind] if name not in stated]:
        raise ValueError(f"RoPE of type {kind!r} lacks {', '.join(missing)}.")
    if unknown := stated.keys() - set(allowed):
        raise ValueError(f"RoPE of type {kind!r} has no {', '.join(sorted(unknown))}.")
    _check_values(stated | {"rope_theta": theta})
    rope = {"rope_type": kind, "rope_theta": theta, **stated}
    if kind in ("default", "linear"):
        return rope
    original = original or keys.get(_LENGTH)
    if original is not None:
        _check_values({ORIGINAL: original})
        rope[ORIGINAL] = original
    return _with_attention_factor(rope, keys) if kind == "longrope" else rope


def _stated(keys: Mapping[str, Any]) -> dict[str, Any]:
    """What the keys of either version state, without null and without what has no effect."""
    places: list[Mapping[str, Any]] = [{name: keys.get(name) for name in ("rope_theta", ORIGINAL, _PARTIAL)}]
    for name in ("rope_scaling", "rope_parameters"):
        value = keys.get(name) or {}
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a table, not {value!r}.")
        places.append(_for_all_layers(value, keys.get("layer_types")))
    stated: dict[str, Any] = {}
    for place in places:
        for given, value in place.items():
            name = "rope_type" if given == "type" else given
            if value is None or name in _WITHOUT_EFFECT:
                continue
            if name in stated and stated[name] != value:
                raise ValueError(f"The configuration states {name} twice: {stated[name]!r} and {value!r}.")
            stated[name] = value
    if stated.pop(_PARTIAL, 1.0) != 1.0:
        raise ValueError(f"{_PARTIAL} must be 1: HypeNet and its teachers turn whole heads.")
    return stated


def _for_all_layers(rope: Mapping[str, Any], layer_types: Any) -> Mapping[str, Any]:
    """`rope`, or what it states for every type of layer alike."""
    nested = {name: value for name, value in rope.items() if isinstance(value, Mapping) or name.endswith("_attention")}
    if not nested:
        return rope
    used = [nested.get(name) for name in sorted(set(layer_types or nested))]
    if used[0] is None or any(value != used[0] for value in used):
        raise ValueError(f"RoPE differs by the type of layer ({', '.join(sorted(nested))}), and HypeNet has one.")
    # transformers 5.0 puts a theta of its own beside those of the types.
    return {name: value for name, value in rope.items() if name not in nested} | dict(used[0])


def _check_values(stated: Mapping[str, Any]) -> None:
    for name, value in stated.items():
        if name == "truncate":
            if not isinstance(value, bool):
                raise ValueError(f"RoPE's {name} must be true or false, not {value!r}.")
            continue
        numbers = value if name in LISTS and isinstance(value, list) else [value]
        if not all(isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < math.inf for n in numbers):
            raise ValueError(f"RoPE's {name} must be above 0, not {value!r}.")


def _with_attention_factor(rope: dict[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """longrope with `factor` and `attention_factor`.

    transformers 4 takes `factor` from the lengths where the configuration has an `original_max_position_embeddings`
    of its own, 5 takes what is stated.
    """
    original: Any = rope.get(ORIGINAL)
    length: Any = keys.get(_LENGTH)
    if original is None or not (length or "factor" in rope):
        raise ValueError(f"RoPE of type 'longrope' needs {ORIGINAL} and a factor, or {_LENGTH}.")
    if "factor" not in rope:
        rope["factor"] = length / original
    factor = rope["factor"]
    if "attention_factor" not in rope:
        if keys.get(ORIGINAL) and length and factor != length / original:
            raise ValueError(
                f"RoPE's factor is {factor:g}, but {_LENGTH} / {ORIGINAL} is {length / original:g}: state the "
                "attention_factor."
            )
        rope["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return rope
