"""A teacher's config.json means the same on each transformers, whichever wrote it; what does not is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from halo.errors import UserError
from halo.models.build import build_teacher
from halo.models.gguf import where
from halo.models.loading import find_teacher, load_hybrid, load_model_config, load_teacher
from halo.models.tokenizer import load_tokenizer
from halo.plan.shapes import teacher_shapes
from halo.preset import load_config
from hypenet import HypeNetConfig, hybrid_config, hybrid_from_teacher
from hypenet.rope import ORIGINAL, ROPE_TYPES, read_rope
from hypenet.transfer import TEACHERS
from tests.distributed import jobs
from tests.hypenet.test_transfer import ROPES

THETA = 5000.0
KEYS = ("rope_theta", "rope_scaling", "rope_parameters", ORIGINAL)
FOUR = [1.0, 1.5, 2.0, 2.5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with weights for each family."""
    made = {}
    for family in TEACHERS:
        torch.manual_seed(0)
        keys = jobs.SHAPE | {"head_dim": 8, "max_position_embeddings": 64, "sliding_window": None}
        made[family] = tmp_path_factory.mktemp(family)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys)).save_pretrained(made[family])
    return made


def state(folder, **keys):
    """Write RoPE's keys, and others, into a folder's config.json. None takes a key out."""
    file = folder / "config.json"
    old = {name: value for name, value in json.loads(file.read_text()).items() if name not in KEYS}
    file.write_text(json.dumps({name: value for name, value in (old | keys).items() if value is not None}))
    return folder


def spellings(kind):
    """As transformers 4 and 5 write one RoPE. 4 keeps longrope's original length beside `rope_scaling`."""
    values = dict(ROPES[kind])
    new = {"rope_parameters": {"rope_theta": THETA, "rope_type": kind, **values}}
    beside = {ORIGINAL: values.pop(ORIGINAL)} if kind == "longrope" else {}
    old = {"rope_theta": THETA, **beside}
    return (old if kind == "default" else old | {"rope_scaling": {"rope_type": kind, **values}}), new


def computed(model):
    tokens = torch.arange(90)[None] % 60
    with torch.no_grad():
        return [model.model.rotary_emb.inv_freq.clone(), *(model(tokens[:, :n]).logits for n in (12, 90))]


@pytest.mark.parametrize("kind", ROPE_TYPES)
@pytest.mark.parametrize("family", TEACHERS)
def test_a_teacher_is_one_in_either_spelling(folders, family, kind):
    models = []
    for keys in spellings(kind):
        folder = state(folders[family], **keys)
        models += [build_teacher(folder), load_teacher(folder)]
        assert teacher_shapes(str(folder))[0].to_dict() == load_model_config(folder).to_dict()
    first, *others = [computed(model) for model in models]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert models[0].model.rotary_emb.rope_type == kind
    if kind in ("default", "linear", "dynamic"):
        plain = THETA ** (-torch.arange(0, 8, 2) / 8)
        torch.testing.assert_close(models[0].model.rotary_emb.original_inv_freq, plain / (4 if kind == "linear" else 1))
    hybrid = hybrid_from_teacher(models[0], hybrid_config(models[0].config, [1], attn_use_rope=True))
    assert torch.equal(hybrid.model.rotary_emb.inv_freq, type(models[0].model.rotary_emb)(models[0].config).inv_freq)


def longrope(**keys):
    return {"rope_type": "longrope", "short_factor": FOUR, "long_factor": FOUR, **keys}


REFUSED = {
    "theta twice": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        "rope_theta twice: 10000.0 and",
    ),
    "scaling twice": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        "states factor twice: 2.0 and 4.0",
    ),
    "type twice": ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "rope_type twice"),
    "original twice": (
        {ORIGINAL: 32, "rope_scaling": {"type": "yarn", "factor": 2.0, ORIGINAL: 16}},
        "states original_max_position_embeddings twice",
    ),
    "mrope": ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "type 'mrope'; supported"),
    "sections": ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "has no mrope_section"),
    "proportional": ({"rope_parameters": {"rope_type": "proportional"}}, "type 'proportional'; supported"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    "partial inside": ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor must be 1"),
    "no factor": ({"rope_parameters": {"rope_type": "yarn", ORIGINAL: 16}}, "type 'yarn' lacks factor"),
    "no type": ({"rope_scaling": {"factor": 4.0}}, "scaled without a rope_type"),
    "no list": ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "lacks short_factor, long_factor"),
    "a narrow list": ({"rope_parameters": longrope(short_factor=[1.0], factor=2.0)}, r"head_dim / 2 = 4 values each"),
    "a factor that is not the lengths'": (
        {ORIGINAL: 16, "rope_scaling": longrope(factor=2.0)},
        "factor is 2, but max_position_embeddings / original_max_position_embeddings is 4",
    ),
    "words": ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor must be above 0, not '4'"),
    "a word for a table": ({"rope_scaling": "linear"}, "rope_scaling must be a table"),
    "no base": ({"rope_theta": -1.0}, "rope_theta must be above 0"),
    "two ropes": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        r"differs by the type of layer \(full_attention, sliding_attention\)",
    ),
    "a layer without": ({"rope_parameters": {"full_attention": None}}, "differs by the type of layer"),
    "text_config": ({"text_config": {"rope_theta": 1e6}}, "has a text_config"),
    "another layer": ({"layer_types": ["full_attention", "linear_attention"] * 2}, "layer_types have linear_attention"),
    "a window that is off": ({"layer_types": ["sliding_attention"] * 4}, "layer_types have sliding_attention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_in_a_line(folders, tmp_path, case):
    keys, message = REFUSED[case]
    original = (folders["llama"] / "config.json").read_text()
    (tmp_path / "config.json").write_text(original)
    if case == "two ropes":
        keys = keys | {"layer_types": None}
    with pytest.raises((UserError, ValueError), match=message) as caught:
        hybrid_config(load_model_config(state(tmp_path, **keys)), [1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_parameters": {}, "rope_theta": THETA}, THETA),
        ({"rope_parameters": {}}, 10_000.0),
        ({"rope_parameters": None, "rope_scaling": {}, "rope_theta": THETA}, THETA),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": THETA}}}, THETA),
        ({"rope_parameters": {"rope_theta": THETA, "partial_rotary_factor": 1.0}}, THETA),
    ],
)
def test_a_configuration_without_scaling(folders, rope, theta):
    """A teacher's and a hybrid's, in every way in which it is written."""
    config = load_model_config(state(folders["qwen3"], **rope))
    assert read_rope(config.to_dict()) == {"rope_type": "default", "rope_theta": theta}
    hybrid = HypeNetConfig(**jobs.SHAPE, **rope)
    assert read_rope(hybrid.to_dict()) == {"rope_type": "default", "rope_theta": theta}


@pytest.mark.parametrize("family", TEACHERS)
def test_heads_without_a_width_are_a_part_of_the_hidden_size(folders, tmp_path, family):
    folder = state(folders[family], rope_theta=THETA, rope_scaling={"type": "yarn", "factor": 4.0})
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"head_dim": None})
    )
    config = load_model_config(tmp_path)
    assert config.head_dim == config.hidden_size // config.num_attention_heads
    assert AutoModelForCausalLM.from_config(config).model.rotary_emb.rope_type == "yarn"


def test_code_beside_a_teacher_is_not_run(tmp_path, monkeypatch):
    """Nor does a terminal ask whether it may."""
    teacher = shutil.copytree(load_config("tiny").teacher, tmp_path / "teacher")
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    for name in ("evil.py", "custom_generate/generate.py"):
        (teacher / name).parent.mkdir(exist_ok=True)
        (teacher / name).write_text(code)
    keys = json.loads((teacher / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    (teacher / "config.json").write_text(json.dumps(keys | {"auto_map": {name: "evil.Evil" for name in names}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    for load in (find_teacher, load_teacher, load_hybrid):  # transformers would run it in spite of trust_remote_code
        with pytest.raises(UserError, match=r"custom_generate/generate.py would be run .*: no code of a model is run"):
            load(teacher)
    shutil.rmtree(teacher / "custom_generate")
    assert find_teacher(str(teacher)) == teacher
    assert load_teacher(teacher).config.model_type == "qwen3"
    load_tokenizer(teacher)
    (teacher / "config.json").write_text((teacher / "config.json").read_text().replace('"qwen3"', '"evil"'))
    with pytest.raises(UserError, match="is a 'evil'; supported: "):
        find_teacher(str(teacher))
    assert where(teacher)["trust_remote_code"] is False
    assert not (tmp_path / "ran").exists()
