"""What halo asks of a teacher's family, as hypenet.transfer.FAMILIES has it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from halo import bounds
from halo.errors import UserError
from halo.json_files import read_json
from hypenet.transfer import FAMILIES, TEACHERS


@with_config(ConfigDict(extra="allow"))
class ModelKeys(TypedDict, total=False):
    """The keys of a teacher's configuration that decide its shapes. Only these are checked: transformers has others."""

    architectures: list[str] | None
    model_type: str
    hidden_size: bounds.Width
    intermediate_size: bounds.Width
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    num_hidden_layers: bounds.Layers
    num_attention_heads: bounds.Width
    num_key_value_heads: bounds.Width | None
    head_dim: bounds.Width | None
    max_position_embeddings: Annotated[int, Field(ge=1)]
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    use_sliding_window: bool
    sliding_window: int | None
    layer_types: list[str] | None
    quantization_config: dict[str, Any] | None


def model_keys(file: Path) -> dict[str, Any]:
    """All keys of a teacher's configuration.

    Raises:
        UserError: as `read_json`.
    """
    keys: dict[str, Any] = read_json(file, ModelKeys, "copy it again")
    return keys


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
