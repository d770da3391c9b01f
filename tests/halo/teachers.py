"""The shapes of the presets' teachers, without a network."""

from pathlib import Path

from transformers import AutoConfig, Qwen3Config

_SHAPES = {
    "Qwen/Qwen3-1.7B": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "Qwen/Qwen3-4B": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "Qwen/Qwen3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}


def teacher_config(name: str) -> Qwen3Config:
    """The configuration of a preset's teacher: a local folder's, or the published shape of a hub id."""
    if Path(name).is_dir():
        return AutoConfig.from_pretrained(name)
    return Qwen3Config(
        **_SHAPES[name],
        vocab_size=151_936,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1_000_000.0,
        max_position_embeddings=40_960,
        tie_word_embeddings=name != "Qwen/Qwen3-8B",
    )
