"""What halo asks of a teacher's family, as hypenet.transfer.FAMILIES has it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halo.errors import UserError
from hypenet.transfer import FAMILIES, TEACHERS


def check_family(model_type: str | None, teacher: str | Path) -> None:
    """Refuse a teacher of a family that cannot be converted.

    Args:
        model_type: from its configuration, or its GGUF file's architecture.
        teacher: its name or path, for the error.

    Raises:
        UserError: there is no such family.
    """
    if model_type not in FAMILIES:
        raise UserError(f"the teacher at {teacher} is a '{model_type}'; supported: {', '.join(TEACHERS)}")


def window_of(attention: Any) -> int | None:
    """How many tokens a teacher's attention layer sees, itself included; None: all."""
    place = FAMILIES[attention.config.model_type].window
    if place is None:
        return None
    return attention.sliding_window if place == "layer" else attention.config.sliding_window


def family_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a teacher's configuration, without those that transformers would read as another model.

    Raises:
        ValueError: they state layers that the family does not have.
    """
    if isinstance(keys.get("text_config"), Mapping):
        raise ValueError("it has a text_config: take the model that is only its text part")
    # A head_dim of null is no width to some of transformers' RoPE and attention.
    known = {name: value for name, value in keys.items() if name != "head_dim" or value is not None}
    if len(known) < len(keys):
        known["head_dim"] = known["hidden_size"] // known["num_attention_heads"]
    _check_layer_types(known)
    return known


def _check_layer_types(keys: Mapping[str, Any]) -> None:
    types, window = keys.get("layer_types"), keys.get("sliding_window")
    if types is None:
        return
    place = FAMILIES[keys["model_type"]].window
    if place == "layer":
        wanted = {"full_attention", "sliding_attention"} if keys.get("use_sliding_window") and window else None
    else:
        wanted = {"sliding_attention"} if place == "config" and window else None
    if others := set(types) - (wanted or {"full_attention"}):
        raise ValueError(f"its layer_types have {', '.join(sorted(others))}, which a {keys['model_type']} has not here")
