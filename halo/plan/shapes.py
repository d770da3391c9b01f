"""The shapes of a teacher: from its own configuration, or from what is published."""

from pathlib import Path

from transformers import PretrainedConfig, Qwen3Config

from halo.errors import UserError
from halo.models.gguf import is_gguf
from halo.models.loading import load_model_config

_QWEN3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960}
PUBLISHED = {
    "Qwen/Qwen3-1.7B": _QWEN3
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-4B": _QWEN3
    | {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 9728,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": _QWEN3
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 12_288,
        "tie_word_embeddings": False,
    },
}
"""The shapes of the teachers' published config.json, so that nothing must be downloaded."""


def teacher_shapes(name: str) -> tuple[PretrainedConfig, str]:
    """A teacher's configuration, and its source in words. Nothing is downloaded.

    Raises:
        UserError: neither a local model nor one whose shapes are known, or a configuration that cannot be read.
    """
    path = Path(name)
    if is_gguf(name) or (path / "config.json").is_file():
        return load_model_config(path), f"the shapes of {path}"
    if name not in PUBLISHED:
        raise UserError(
            f"the shapes of the teacher '{name}' are not known here, and nothing is downloaded: give a local folder "
            f"with its config.json, or one of {', '.join(PUBLISHED)}"
        )
    return Qwen3Config(**PUBLISHED[name]), f"the published shapes of {name}"
