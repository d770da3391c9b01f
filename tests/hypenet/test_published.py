"""The published checkpoints: their folders load as they are, are written again bit for bit, and nothing is guessed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hypenet import HypeNetForCausalLM
from hypenet.modeling_hypenet import HypeNetModel

WIDTH, FFN, WORDS, HEADS, KV_HEADS, DIM = 32, 48, 61, 4, 2, 8
MIXERS = ["lightning-attn", "attn", "lightning-attn"]
CONFIG = {
    "architectures": ["HypeNetForCausalLM"],
    "model_type": "hypenet",
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": len(MIXERS),
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.0",
    "mixer_types": MIXERS,
    "attn_use_rope": False,
    "attn_use_output_gate": True,
    "attn_logits_scaling": "hype 500",
    "expand_kv_proj": True,
    "lightning_use_rope": True,
    "lightning_use_qk_norm": True,
    "lightning_use_output_norm": True,
    "lightning_use_output_gate": True,
    "lightning_nh": HEADS,
    "lightning_nkv": HEADS,
    "lightning_head_dim": DIM,
    "lightning_scale": "1/sqrt(d)",
    "lightning_use_short_conv": False,
    # What the published code writes too, and HypeNet has no use for.
    "lightning_conv_size": 4,
    "lightning_rope_scaling": None,
    "loss_fn": "ce",
    "fused_ce_loss": True,
    "shift_labels": True,
    "rand_init": False,
}
RENAMED = {"torch_dtype", "rope_theta", "rope_scaling", "transformers_version"}
"""Keys that transformers has under other names by now."""


def published_weights(tied):
    """Every parameter of a published checkpoint, drawn in bfloat16."""
    shapes = {"model.embed_tokens": (WORDS, WIDTH), "model.norm": (WIDTH,)}
    if not tied:
        shapes["lm_head"] = (WORDS, WIDTH)
    width = HEADS * DIM
    for i, mixer in enumerate(MIXERS):
        kv_width = (KV_HEADS if mixer == "attn" else HEADS) * DIM
        own = {"o_gate": (width, WIDTH)} if mixer == "attn" else {"z_proj": (width, WIDTH), "o_norm": (width,)}
        block = {
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
            "mlp.gate_proj": (FFN, WIDTH),
            "mlp.up_proj": (FFN, WIDTH),
            "mlp.down_proj": (WIDTH, FFN),
            "self_attn.q_proj": (width, WIDTH),
            "self_attn.k_proj": (kv_width, WIDTH),
            "self_attn.v_proj": (kv_width, WIDTH),
            "self_attn.o_proj": (WIDTH, width),
            "self_attn.q_norm": (DIM,),
            "self_attn.k_norm": (DIM,),
        }
        block |= {f"self_attn.{name}": shape for name, shape in own.items()}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(5)
    return {
        f"{name}.weight": (0.3 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()
    }


def write(folder, weights, tied=False, **keys):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": tied, **keys}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture
def folder(tmp_path, tied):
    return write(tmp_path / "published", published_weights(tied), tied)


def test_it_loads_and_is_written_again_bit_for_bit(folder, tied, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert type(model) is HypeNetForCausalLM and model.dtype == torch.bfloat16 and not model.training
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        assert torch.equal(after[name].view(torch.int16), value.view(torch.int16)), name


def test_every_key_of_its_configuration_keeps_its_value(folder, tied, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(tmp_path / "again")
    first, second = (AutoConfig.from_pretrained(path) for path in (folder, tmp_path / "again"))
    for name, value in {**CONFIG, "tie_word_embeddings": tied}.items():
        if name not in RENAMED:
            assert getattr(first, name) == getattr(second, name) == value, name
    assert first.dtype == second.dtype == torch.bfloat16
    rope = [getattr(c, "rope_parameters", None) or {"rope_theta": c.rope_theta} for c in (first, second)]
    assert rope[0] == rope[1] and rope[0]["rope_theta"] == 1000000
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    only_ours = {name: value for name, value in CONFIG.items() if name.startswith(("mixer", "attn_", "lightning"))}
    assert {name: written[name] for name in only_ours} == only_ours
    assert (written["model_type"], written["architectures"]) == ("hypenet", ["HypeNetForCausalLM"])


def test_in_another_precision_the_values_are_the_same(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.dtype == torch.float32
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value.float()), name


def test_its_head_is_its_own(tmp_path):
    """Untied: neither loading nor resizing nor saving puts the embedding in the head's place."""
    weights = published_weights(tied=False)
    model = AutoModelForCausalLM.from_pretrained(write(tmp_path / "published", weights), dtype="auto")
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_head_is_not_lost_to_a_configuration_that_ties_it(tmp_path):
    folder = write(tmp_path / "published", published_weights(tied=False), tied=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not its embedding, .* set tie_word_embeddings to false"):
        AutoModelForCausalLM.from_pretrained(folder)
    weights = published_weights(tied=False)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model = AutoModelForCausalLM.from_pretrained(write(folder, weights, tied=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, HypeNetForCausalLM.from_pretrained])
def test_weights_that_do_not_fit_are_one_clear_error(folder, load):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.z_proj.weight"
    del weights[name]
    weights["model.layers.1.self_attn.other.weight"] = torch.ones(3)
    weights["model.layers.2.self_attn.q_norm.weight"] = torch.ones(DIM + 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its configuration \(HypeNetForCausalLM\)") as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert f"missing: {name}; " in str(error.value)
    assert "unknown: model.layers.1.self_attn.other.weight; " in str(error.value)
    assert "of another shape: model.layers.2.self_attn.q_norm.weight." in str(error.value)


def test_a_long_list_of_names_is_cut(folder):
    weights = {n: v for n, v in load_file(folder / "model.safetensors").items() if ".layers." not in n}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.\S*, .* and 26 more\.$"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_untied_head_that_is_missing_is_an_error(tmp_path):
    folder = write(tmp_path / "published", published_weights(tied=True), tied=False)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight\.$"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_bias_of_the_head_is_unknown(folder):
    weights = load_file(folder / "model.safetensors") | {"lm_head.bias": torch.ones(WORDS)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unknown: lm_head\.bias\.$"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_loading_info_and_leave_to_differ_are_as_in_transformers(folder):
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = load_file(folder / "model.safetensors") | {"model.norm.weight": torch.ones(WIDTH + 1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    assert "model.norm.weight" in next(iter(info["mismatched_keys"]))  # a name, or a name and two shapes
    assert torch.equal(model.model.norm.weight, torch.ones(WIDTH))


def test_the_decoder_alone_leaves_the_head(folder):
    decoder = HypeNetModel.from_pretrained(folder, dtype="auto")
    assert torch.equal(decoder.norm.weight, load_file(folder / "model.safetensors")["model.norm.weight"])


def test_shards_load_as_one_file_does(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype="auto")
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
