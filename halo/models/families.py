"""What halo asks of a teacher's family, as hypenet.transfer.FAMILIES has it."""

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
