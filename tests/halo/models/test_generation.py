"""The teacher's generation configuration, and the rehearsal of what a conversion writes."""

import json
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerFast

from halo.errors import UserError
from halo.models.build import build_student
from halo.models.generation import read_generation
from halo.models.loading import load_model_config
from halo.models.rehearsal import rehearse
from halo.preset import load_config
from hypenet.transfer import hybrid_config
from tests.distributed import jobs

CONFIG = load_config("tiny")


@pytest.fixture
def teacher(tmp_path):
    return shutil.copytree(CONFIG.teacher, tmp_path / "teacher")


@contextmanager
def files_of_at_most(size: int):
    """As on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def say(folder: Path, content: object) -> Path:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "generation_config.json").write_bytes(text)
    return folder


@pytest.mark.parametrize(
    ("says", "unset"),
    [
        ({}, []),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [1, 2]}, []),
        ({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 7}, ["temperature", "top_p"]),
        ({"do_sample": False, "top_k": 20, "min_p": 0.1}, ["top_k", "min_p"]),
        ({"do_sample": None, "temperature": 0.6}, ["temperature"]),
        ({"temperature": 0.0}, ["temperature"]),
        ({"typical_p": 0.3, "epsilon_cutoff": 0.1, "eta_cutoff": 0.2}, ["typical_p", "epsilon_cutoff", "eta_cutoff"]),
        ({"num_beams": 1, "length_penalty": 2.0}, ["length_penalty"]),
        ({"num_beams": None, "length_penalty": 2.0}, ["length_penalty"]),
        ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}, []),
        ({"num_return_sequences": 3, "do_sample": True}, []),
        ({"output_scores": True}, ["output_scores"]),
        ({"pad_token_id": -1}, ["pad_token_id"]),
        ({"use_cache": False, "cache_implementation": "static"}, ["cache_implementation"]),
        ({"of_ours": {"a": 1}}, []),
    ],
    ids=str,
)
def test_what_is_written_is_what_has_an_effect(tmp_path, says, unset):
    config, left_out = read_generation(say(tmp_path, says))
    assert left_out == unset
    config.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in says.keys() - set(unset)} == {
        name: value for name, value in says.items() if name not in unset
    }
    assert all(getattr(again, name) == getattr(GenerationConfig(), name) for name in unset)


def test_a_folder_that_says_nothing(tmp_path):
    assert read_generation(tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (b"", "is not a valid JSON file"),
        (b"{", "is not a valid JSON file"),
        ("{}".encode("utf-16"), "is not a valid JSON file"),
        ([1], "list"),
        ({"early_stopping": "maybe"}, "`early_stopping` must be a boolean"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
        ({"max_new_tokens": "5"}, "not supported between instances of 'str' and 'int'"),
        ({"num_return_sequences": 3}, "`num_return_sequences` different than 1"),
        ({"cache_implementation": "foo"}, r"Invalid `cache_implementation` \(foo\)"),
        ({"streamer": 1}, "`streamer` is not a valid argument"),
        ({"compile_config": {"fullgraph": True}}, "You provided `compile_config`"),
    ],
    ids=str,
)
def test_what_is_not_valid_is_refused(teacher, says, why):
    say(teacher, says)
    for check in (lambda: read_generation(teacher), lambda: rehearse(teacher, CONFIG)):
        with pytest.raises(UserError, match=rf"generation_config.json: .*{why}.*: correct this file") as error:
            check()
        assert "\n" not in str(error.value)


def test_a_student_of_a_teacher_whose_sampling_is_switched_off_is_saved(tmp_path):
    made = jobs.files(tmp_path / "made")
    say(made / "teacher", {"temperature": 0.6, "eos_token_id": [1, 2]})
    config = hybrid_config(load_model_config(made / "teacher"), [1])
    student = build_student(made / "teacher", config, made / "mixers.safetensors", lambda piece: None)
    student.save_pretrained(tmp_path / "hybrid")
    again = GenerationConfig.from_pretrained(tmp_path / "hybrid")
    assert (again.temperature, again.eos_token_id) == (GenerationConfig().temperature, [1, 2])


def test_a_rehearsal_says_what_is_left_out_and_leaves_nothing(teacher, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    assert rehearse(teacher, CONFIG) == []
    assert {path.name: path.read_bytes() for path in teacher.iterdir()} == before
    assert rehearse(say(teacher, {"top_p": 0.9}), CONFIG) == ["top_p"]
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("size", [100, 10_000])
def test_a_rehearsal_on_a_full_disk(teacher, size):
    """The first file, and the tokenizer's."""
    line = rf"a hybrid of the teacher at {teacher} cannot be written \(tried in .*\): .*"
    with pytest.raises(UserError, match=line) as error, files_of_at_most(size):
        rehearse(teacher, CONFIG)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_is_saved_as_another(teacher, monkeypatch):
    real = PreTrainedTokenizerFast.save_pretrained

    def save(self, folder):
        self.add_tokens(["<new>"])
        return real(self, folder)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    add = r"its tokenizer is another one after it was saved"
    with pytest.raises(UserError, match=add):
        rehearse(teacher, CONFIG)
