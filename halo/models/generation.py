"""The generation configuration of a model's folder, as it can be written again."""

from pathlib import Path

from transformers import GenerationConfig

from halo.errors import UserError
from hypenet.transfer import savable_generation

GENERATION = "generation_config.json"


def read_generation(source: Path) -> tuple[GenerationConfig | None, list[str]]:
    """What `generation_config.json` beside a model says, and the settings in it that have no effect and are left out.

    transformers would read those, and refuse to write them when the model is saved.

    Args:
        source: a model's folder.

    Returns:
        None in place of the configuration if there is no such file.

    Raises:
        UserError: it cannot be read, or a value is not valid.
    """
    path = source / GENERATION
    if not path.is_file():
        return None, []
    try:
        return savable_generation(GenerationConfig.from_pretrained(path.parent))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {reason}: correct this file, or remove it to generate by the defaults") from error
