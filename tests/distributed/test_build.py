"""Models built piece by piece are, on any number of ranks, what a whole construction gives, in less memory."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.distributed import build_jobs, jobs
from tests.distributed.ranks import run_ranks


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for model in ours:
        assert ours[model].keys() == theirs[model].keys()
        for name, tensor in theirs[model].items():
            assert torch.equal(ours[model][name], tensor), (model, name)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_model_is_the_same_on_one_rank_and_partitioned_over_two(tmp_path, tied):
    made = jobs.files(tmp_path / "made", tie_word_embeddings=tied)
    assert len(list((made / "teacher").glob("*.safetensors"))) > 1
    expected = build_jobs.every_model_in_memory(made)
    assert ("lm_head.weight" in expected["student"]) == (not tied)
    (one,) = run_ranks(1, build_jobs.every_model, made, "zero1.json")
    assert_same(one, expected)
    for ours in run_ranks(2, build_jobs.every_model, made, "zero3.json"):
        assert_same(ours, expected)


def test_an_engine_of_every_configuration_holds_what_was_built(tmp_path):
    made = jobs.files(tmp_path / "made")
    expected = build_jobs.every_model_in_memory(made)["student"]
    found, nothing = run_ranks(2, build_jobs.in_engines, made)
    assert not any(nothing)
    assert len(found) == 4
    for ours in found:
        assert ours.keys() == {f"student.{name}" for name in expected if "rotary" not in name}
        for name, tensor in ours.items():
            assert torch.equal(tensor, expected[name.removeprefix("student.")]), name


def test_weights_are_in_bf16_masters_and_rope_in_fp32(tmp_path):
    (dtypes,) = run_ranks(1, build_jobs.in_bf16, jobs.files(tmp_path / "made"))
    assert dtypes == {"weights": {torch.bfloat16}, "masters": {torch.float32}, "buffers": {torch.float32}}


def test_one_piece_is_whole_at_a_time(tmp_path):
    made = jobs.files(tmp_path / "made", tie_word_embeddings=False)
    weights = build_jobs.every_model_in_memory(made)["student"]
    size = {}
    for name, tensor in weights.items():
        if "rotary" not in name:
            piece = ".".join(name.split(".")[: 3 if ".layers." in name else -1])
            size[piece] = size.get(piece, 0) + tensor.nbytes
    for seen in run_ranks(2, build_jobs.pieces_whole_at_once, made):
        assert seen == [(bytes_, 0) for bytes_ in size.values()]


def test_a_rank_holds_its_share_and_a_piece_in_memory(tmp_path):
    """Of models of 220 (teacher) and 250 MB (student) in float32, in pieces of 16 MB at most."""
    made, shape = tmp_path / "made", jobs.SHAPE | {"vocab_size": 8000, "num_hidden_layers": 16, "hidden_size": 512}
    shape |= {"intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    torch.manual_seed(0)
    teacher = Qwen3ForCausalLM(Qwen3Config(**shape))
    teacher.save_pretrained(made / "teacher")
    mixers = jobs.whole_mixers(teacher)
    save_file(mixers, made / "mixers.safetensors")
    attention = sum(p.nbytes for n, p in teacher.named_parameters() if ".self_attn." in n) / 1e6
    of_teacher = sum(p.nbytes for p in teacher.parameters()) / 1e6
    of_student = of_teacher - attention + sum(p.nbytes for p in mixers.values()) / 1e6
    del teacher, mixers

    (whole,) = run_ranks(1, build_jobs.in_memory, made)
    assert whole > of_student
    for job, size in ((build_jobs.partitioned, of_student), (build_jobs.sharded, of_teacher)):
        for grown in run_ranks(2, job, made):
            assert grown < size / 2 + 45, job


def test_both_ranks_are_refused_what_does_not_fit(tmp_path):
    made, lost = jobs.files(tmp_path / "made"), []
    for folder in (made / "teacher", made / "hybrid"):
        files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        lost.append(folder / files["model.norm.weight"])
        lost[-1].unlink()
    for told in run_ranks(2, build_jobs.refusals, made):
        assert len(told) == 2
        assert all(f"{f} cannot be read" in line and "\n" not in line for f, line in zip(lost, told, strict=True))
