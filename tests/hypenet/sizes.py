"""The keys of the small models that these tests run."""

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "rope_theta": 5000.0,
    "pad_token_id": 0,
    "eos_token_id": None,
}
MIXERS = ["lightning-attn", "attn", "lightning-attn", "attn"]
