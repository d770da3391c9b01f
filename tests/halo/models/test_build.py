"""Building from files in one process: every teacher is what transformers loads, and what does not fit is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from halo.distributed import broadcast
from halo.errors import UserError
from halo.models.build import build_hybrid, build_student, build_teacher, check_teacher
from halo.models.folders import weight_files
from halo.models.loading import load_teacher
from halo.models.weights import SafeTensors
from hypenet.transfer import TEACHERS, hybrid_config
from tests.distributed import jobs

INDEX = "model.safetensors.index.json"


def place(piece):
    broadcast(piece.parameters())


@pytest.fixture
def made(tmp_path):
    """A teacher, untied, stage 1's mixers and a hybrid, each in several files."""
    return jobs.files(tmp_path / "made", tie_word_embeddings=False)


def change(folder, **tensors):
    """Write the weights anew into one file, with other `tensors` by name; None leaves one out."""
    weights = {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    weights = {name: tensor for name, tensor in (weights | tensors).items() if tensor is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def assert_is(ours, theirs):
    """In weights, buffers, settings and dtypes, and not by sharing memory with a file."""
    for kind in ("parameters", "buffers"):
        expected = dict(getattr(theirs, f"named_{kind}")())
        found = dict(getattr(ours, f"named_{kind}")())
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not ours.training


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", TEACHERS)
def test_a_teacher_is_what_transformers_loads(tmp_path, family, tied):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    keys = {"tie_word_embeddings": tied, "max_position_embeddings": 64, "rope_scaling": rope, "sliding_window": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **jobs.SHAPE | keys))
    model.generation_config.update(temperature=0.3, do_sample=True)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    check_teacher(tmp_path)
    built = build_teacher(tmp_path)
    assert_is(built, load_teacher(tmp_path))
    assert not any(parameter.requires_grad for parameter in built.parameters())
    tokens = torch.arange(40)[None]
    assert torch.equal(built(tokens).logits, model.eval()(tokens).logits)


def test_a_head_in_the_file_of_a_tied_teacher(tmp_path):
    """It may stand there if it is the embedding."""
    made = jobs.files(tmp_path / "made")
    embedding = load_teacher(made / "teacher").model.embed_tokens.weight.detach()
    change(made / "teacher", **{"lm_head.weight": embedding.clone()})
    assert build_teacher(made / "teacher").lm_head.weight.data_ptr() != embedding.data_ptr()
    change(made / "teacher", **{"lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match=r"its own head .*: set tie_word_embeddings to false in its config"):
        check_teacher(made / "teacher")


def test_a_student_takes_the_mixers_of_stage_1(made):
    config = hybrid_config(AutoConfig.from_pretrained(made / "teacher"), [1])
    student = build_student(made / "teacher", config, made / "mixers.safetensors", place)
    mixers = load_file(made / "mixers.safetensors")
    for i in (0, 2, 3):
        for name, weight in student.model.layers[i].self_attn.named_parameters():
            assert torch.equal(weight, mixers[f"{i}.{name}"])
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_only_new_weights_are_drawn_and_by_the_seed(made):
    config = hybrid_config(AutoConfig.from_pretrained(made / "teacher"), [1])
    students = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        students.append(build_student(made / "teacher", config, made / "mixers.safetensors", place).state_dict())
    one, same, other = students
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert [name for name in one if not torch.equal(one[name], other[name])] == [
        "model.layers.1.self_attn.o_gate.weight"
    ]


def test_mixers_of_another_architecture(made):
    config = hybrid_config(AutoConfig.from_pretrained(made / "teacher"), [1], lightning_use_output_gate=False)
    with pytest.raises(ValueError, match=r"do not fit: model\.layers\.0\.self_attn\.z_proj\.weight"):
        build_student(made / "teacher", config, made / "mixers.safetensors", place)


@pytest.mark.parametrize("which", ["teacher", "hybrid"])
def test_weights_that_do_not_fit(made, which):
    folder = made / which
    norm = torch.ones(32)
    for tensors, message in [
        ({"model.norm.weight": None}, "lacks weights, model.norm.weight among them"),
        ({"model.norm.weight": norm[:8]}, r"has a model.norm.weight of \[8\], but its configuration says \[32\]"),
        (
            {"model.norm.weight": norm, "model.norm.bias": norm + 1},
            "weights that its .* model.norm.bias among",
        ),
        (
            {"model.norm.bias": None, "model.norm.weight": norm.to(torch.int8)},
            r"is quantized \(model.norm.weight is",
        ),
        ({"model.norm.weight": norm, "lm_head.weight": None}, "lacks weights, lm_head.weight among them"),
    ]:
        change(folder, **tensors)
        with pytest.raises(UserError, match=f"^the {which} at {folder} .*{message}"):
            check_teacher(folder) if which == "teacher" else build_hybrid(folder, place)


def test_old_checkpoints_that_hold_rope_frequencies(made):
    change(made / "teacher", **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    check_teacher(made / "teacher")


def test_files_that_are_not_whole(made):
    folder = made / "teacher"
    weights = weight_files(folder)[0]
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"^{weights} cannot be read: .*: copy it again"):
        check_teacher(folder)
    weights.unlink()
    with pytest.raises(UserError, match=f"^{weights} cannot be read: "):
        check_teacher(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(UserError, match=f"^{folder / INDEX} is not valid: weight_map: "):
        check_teacher(folder)
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        check_teacher(folder)


def test_files_that_the_index_does_not_name_are_not_read(made):
    """As Mistral's folders have them: the same weights again, by other names."""
    save_file({"tok_embeddings.weight": torch.ones(2)}, made / "teacher" / "consolidated.safetensors")
    check_teacher(made / "teacher")
    assert "tok_embeddings.weight" not in SafeTensors(weight_files(made / "teacher"))


def test_what_is_read_outlives_its_files(made):
    teacher = build_teacher(made / "teacher")
    expected = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    for file in weight_files(made / "teacher"):
        with open(file, "r+b") as opened:
            opened.truncate(100)
    shutil.rmtree(made)
    assert all(torch.equal(weight, expected[name]) for name, weight in teacher.state_dict().items())
