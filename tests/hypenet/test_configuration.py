"""The configuration: the published keys, and what is refused."""

import json

import pytest
import transformers
from transformers import AutoConfig

from hypenet import HypeNetConfig
from hypenet.mixers import build_mixer
from tests.hypenet.sizes import MIXERS, SIZES

PUBLISHED = {
    "mixer_types": MIXERS,
    "attn_use_rope": False,
    "attn_use_output_gate": True,
    "attn_logits_scaling": "hype 500",
    "expand_kv_proj": True,
    "lightning_use_rope": True,
    "lightning_use_qk_norm": True,
    "lightning_use_output_norm": True,
    "lightning_use_output_gate": True,
    "lightning_nh": 4,
    "lightning_nkv": 4,
    "lightning_head_dim": 8,
    "lightning_scale": "1/sqrt(d)",
    "lightning_use_short_conv": False,
}


def rope_theta(config):
    return config.rope_theta if transformers.__version__.startswith("4.") else config.rope_parameters["rope_theta"]


def test_defaults_are_the_published_keys():
    config = HypeNetConfig(**SIZES, mixer_types=MIXERS, attn_logits_scaling="hype 500").to_dict()
    assert {name: config[name] for name in PUBLISHED} == PUBLISHED
    assert config["model_type"] == "hypenet"


def test_published_config_json_loads(tmp_path):
    keys = {
        **SIZES,
        **PUBLISHED,
        "model_type": "hypenet",
        "architectures": ["HypeNetForCausalLM"],
        "rope_scaling": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, HypeNetConfig)
    assert config.layer_types == ["linear_attention", "full_attention"] * 2
    assert rope_theta(config) == SIZES["rope_theta"]


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
def test_rope_of_either_transformers_version_is_read(rope):
    """transformers 4 writes rope_theta and rope_scaling, 5 writes rope_parameters."""
    sizes = {name: value for name, value in SIZES.items() if name != "rope_theta"}
    new = HypeNetConfig(**sizes, rope_parameters={"rope_theta": 5000.0, **rope})
    old = HypeNetConfig(**sizes, rope_theta=5000.0, rope_scaling=None if rope["rope_type"] == "default" else dict(rope))
    assert rope_theta(new) == 5000.0
    assert new.to_dict() == old.to_dict()


@pytest.mark.parametrize(("options", "window"), [({}, 512), ({"swa": {"window": 64}}, 64)])
def test_a_sliding_window_is_where_transformers_looks_for_it(options, window, tmp_path):
    config = HypeNetConfig(**SIZES, mixer_types=["swa", "attn", "gla", "lightning-attn"], mixer_options=options)
    config.save_pretrained(tmp_path)
    for c in (config, AutoConfig.from_pretrained(tmp_path)):
        assert (c.sliding_window, c.mixer_options) == (window, options)
        assert c.layer_types == ["sliding_attention", "full_attention", "linear_attention", "linear_attention"]
    assert HypeNetConfig(**SIZES, mixer_types=MIXERS).sliding_window is None


def test_without_mixer_types_every_layer_is_attention():
    assert HypeNetConfig(num_hidden_layers=3).mixer_types == ["attn"] * 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mixer_types": ["attn"]}, "mixer_types names 1 mixers, but num_hidden_layers is 4"),
        ({"lightning_nkv": 3}, "lightning_nh 4 is no multiple of lightning_nkv 3"),
        ({"lightning_scale": "1"}, "lightning_scale must be"),
        ({"lightning_use_short_conv": True}, "lightning_use_short_conv must be False"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"use_sliding_window": True}, "use_sliding_window must be False"),
    ],
)
def test_what_the_model_cannot_do_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        HypeNetConfig(**{**SIZES, "mixer_types": MIXERS, **keys})


GLA = ["gla", "attn", "gla", "attn"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mixer_options": {"attn": {"use_rope": True}}}, "The options of 'attn' are the attn_\\* keys"),
        ({"mixer_options": {"lightning-attn": {}}}, "The options of 'lightning-attn' are the lightning_\\* keys"),
        ({"mixer_types": GLA, "lightning_use_rope": False}, "lightning_use_rope without a Lightning layer"),
        ({"expand_kv_proj": False, "lightning_nkv": 4}, "expand_kv_proj is False, but lightning_nkv is 4"),
        ({"lightning_rope_scaling": {"factor": 4}}, "lightning_rope_scaling must be null"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        *(
            ({"attn_logits_scaling": spec}, "attn_logits_scaling must be None, a positive number, or 'hype a'")
            for spec in ("hype500", "hype 1", "500", True, 0, -1.5)
        ),
    ],
)
def test_what_would_have_no_effect_or_none_that_is_meant_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        HypeNetConfig(**{**SIZES, "mixer_types": MIXERS, **keys})


@pytest.mark.parametrize("name", ["deltanet", "gdn", "kda"])
def test_a_delta_rule_needs_keys_of_length_one(name):
    config = HypeNetConfig(**{**SIZES, "mixer_types": [name] * 4, "mixer_options": {name: {"qk_norm": "rms"}}})
    with pytest.raises(ValueError, match="qk_norm must be 'l2', not 'rms': with longer keys the delta rule diverges"):
        build_mixer(config, 0)
