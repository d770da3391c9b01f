"""A rehearsal of what a conversion writes at its end, before it begins: all that comes from the teacher."""

import tempfile
from pathlib import Path

import torch

from halo.config import Config
from halo.errors import UserError
from halo.models.generation import read_generation
from halo.models.loading import load_model_config
from halo.models.tokenizer import load_tokenizer, tokenizer_hash
from hypenet import HypeNetConfig
from hypenet.transfer import empty_hybrid, hybrid_config


def rehearse(teacher: Path, config: Config) -> list[str]:
    """Write a hybrid's configurations and the tokenizer to a folder that is removed again, and read them.

    Args:
        teacher: its folder.

    Returns:
        The names of the teacher's generation settings that have no effect, and that a hybrid will not have.

    Raises:
        UserError: the teacher's generation configuration is not valid, or something cannot be written or read.
    """
    generation, unset = read_generation(teacher)
    tokenizer = load_tokenizer(teacher)
    before = tokenizer_hash(tokenizer)
    shape = hybrid_config(load_model_config(teacher), [], rnn_mixer=config.rnn_mixer, **config.architecture.switches())
    hybrid = empty_hybrid(shape, dtype=torch.float32, device=torch.device("cpu"))
    if generation is not None:
        hybrid.generation_config = generation
    try:
        with tempfile.TemporaryDirectory() as folder:
            hybrid.save_pretrained(folder, state_dict={"model.norm.weight": torch.ones(shape.hidden_size)})
            tokenizer.save_pretrained(folder)
            HypeNetConfig.from_pretrained(folder)
            read_generation(Path(folder))
            if tokenizer_hash(load_tokenizer(folder)) != before:
                raise ValueError("its tokenizer is another one after it was saved")
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"a hybrid of the teacher at {teacher} cannot be written (tried in {tempfile.gettempdir()}): {reason}"
        ) from error
    return unset
