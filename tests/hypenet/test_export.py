"""An exported folder loads with nothing but transformers."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from hypenet.configuration_hypenet import hype_scaling
from hypenet.export import LENGTH, export_pretrained
from hypenet.mixers import MIXERS
from hypenet.rope import ORIGINAL
from tests.hypenet.test_transfer import ROPES

# A process in which the package cannot be imported, although it is installed here.
LOAD = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hypenet", "halo", "fla"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, tokens, result = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = torch.load(tokens)
torch.save(
    {
        "logits": model(tokens).logits.detach(),
        "generated": model.generate(tokens, max_new_tokens=8, do_sample=False),
        "scaling": model.config.attn_logits_scaling,
        "vocabulary": AutoTokenizer.from_pretrained(folder).get_vocab(),
        "modules": [name for name in sys.modules if name.partition(".")[0] == "hypenet"],
    },
    result,
)
"""


@pytest.fixture
def tokenizer():
    words = {f"w{i}": i for i in range(61)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0")


@pytest.fixture
def make_every_mixer(make_hybrid):
    """A function from keys of the configuration to a model with every mixer in a layer of its own."""

    def make(**keys):
        types = sorted(MIXERS)
        return make_hybrid(
            mixer_types=types, num_hidden_layers=len(types), mixer_options={"swa": {"window": 9}}, **keys
        )

    return make


def test_export_loads_where_the_package_is_not(make_every_mixer, tokenizer, tokens, tmp_path):
    model, folder, result = make_every_mixer(), tmp_path / "some-model_1.0", tmp_path / "result.pt"
    export_pretrained(model, tokenizer, folder, logits_scaling=hype_scaling(16))
    assert model.config.attn_logits_scaling is None
    torch.save(tokens, tmp_path / "tokens.pt")
    subprocess.run(
        [sys.executable, "-c", LOAD, folder, tmp_path / "tokens.pt", result],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    loaded = torch.load(result)
    model.config.attn_logits_scaling = "hype 16"
    torch.testing.assert_close(loaded["logits"], model(tokens).logits)
    assert torch.equal(loaded["generated"], model.generate(tokens, max_new_tokens=8, do_sample=False))
    assert (loaded["scaling"], loaded["modules"]) == ("hype 16", [])
    assert loaded["vocabulary"] == tokenizer.get_vocab()


USE = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folder, result = sys.argv[1:]
text = ["w1 w2 w3 w4", "w5 w6"]
trusted = {"trust_remote_code": True}
decoder = AutoModel.from_pretrained(folder, **trusted)
assert len(AutoTokenizer.from_pretrained(folder)(text[0]).input_ids) == 4
(features,) = torch.tensor(pipeline("feature-extraction", model=folder, **trusted)(text[0]))
ids = AutoTokenizer.from_pretrained(folder)(text[0], return_tensors="pt").input_ids
torch.testing.assert_close(features, decoder(ids).last_hidden_state[0])
written = pipeline("text-generation", model=folder, **trusted)(text, batch_size=2, max_new_tokens=3, do_sample=False)
assert len(written) == 2 and "hypenet" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder, **trusted)
options = {"max_new_tokens": 6, "do_sample": False}
expected = model.generate(ids, **options)
assert torch.equal(model.generate(ids, cache_implementation="dynamic", **options), expected)
model.forward = torch.compile(model.forward, dynamic=True, backend="eager")
assert torch.equal(model.generate(ids, **options), expected)
"""


def test_an_export_is_used_as_any_model_is(make_hybrid, tokenizer, tmp_path):
    """The decoder alone, pipelines of a tokenizer that pads on the right, a compiled forward under generate."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    export_pretrained(make_hybrid(), tokenizer, tmp_path / "model", logits_scaling=None)
    subprocess.run(
        [sys.executable, "-c", USE, tmp_path / "model", tmp_path],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def test_exported_folder_is_of_the_published_form(make_hybrid, tokenizer, tmp_path):
    export_pretrained(make_hybrid(attn_logits_scaling="hype 7"), tokenizer, tmp_path, logits_scaling=None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("hypenet", ["HypeNetForCausalLM"])
    assert config["attn_logits_scaling"] is None
    assert config["auto_map"] == {
        "AutoConfig": "configuration_hypenet.HypeNetConfig",
        "AutoModel": "modeling_hypenet.HypeNetModel",
        "AutoModelForCausalLM": "modeling_hypenet.HypeNetForCausalLM",
    }
    assert (tmp_path / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("keys", "trained", "length"),
    [
        ({}, 512, LENGTH),
        ({}, 2 * LENGTH, 2 * LENGTH),
        ({"attn_use_rope": True}, 512, 512),
        ({"attn_use_rope": True}, 16, 64),
        ({"attn_use_rope": True, "mixer_types": ["gla"] * 4}, 512, LENGTH),
    ],
)
def test_an_export_states_the_length_that_it_supports(make_hybrid, tokenizer, tmp_path, keys, trained, length):
    model = make_hybrid(max_position_embeddings=64, **keys)
    model.generation_config.max_length, tokenizer.model_max_length = 48, 32
    export_pretrained(model, tokenizer, tmp_path, logits_scaling=None, trained_length=trained)
    assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == length
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == length
    assert GenerationConfig.from_pretrained(tmp_path).max_length == length
    own = (model.config.max_position_embeddings, tokenizer.model_max_length, model.generation_config.max_length)
    assert own == (64, 32, 48)


def test_an_export_states_no_length_of_generation_of_its_own(make_hybrid, tokenizer, tmp_path):
    export_pretrained(make_hybrid(), tokenizer, tmp_path, logits_scaling=None)
    assert "max_length" not in json.loads((tmp_path / "generation_config.json").read_text())


@pytest.mark.parametrize("kind", ROPES)
def test_rope_is_not_moved_by_the_length_that_an_export_states(make_hybrid, tokenizer, tmp_path, kind):
    """Also where the length is where scaling begins, and the configuration does not repeat it."""
    values = {name: value for name, value in ROPES[kind].items() if name != ORIGINAL}
    model = make_hybrid(max_position_embeddings=64, rope_parameters={"rope_type": kind, **values}).eval()
    export_pretrained(model, tokenizer, tmp_path, logits_scaling=None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.max_position_embeddings == LENGTH
    tokens = torch.arange(90)[None] % 60
    for length in (12, 90):
        assert torch.equal(loaded(tokens[:, :length]).logits, model(tokens[:, :length]).logits)


def test_every_file_that_is_exported_is_named_where_transformers_4_looks(make_every_mixer, tokenizer, tmp_path):
    """Of a folder on the hub it takes the files that modeling_hypenet.py imports, and not those that they import."""
    export_pretrained(make_every_mixer(), tokenizer, tmp_path, logits_scaling=None)
    exported = {path.stem for path in tmp_path.glob("*.py")}
    tree = ast.parse((tmp_path / "modeling_hypenet.py").read_text())
    named = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1}
    assert exported == named | {"modeling_hypenet"}
    assert {cls.__module__.rpartition(".")[2] for cls in MIXERS.values()} <= exported
