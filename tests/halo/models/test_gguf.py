"""Teachers in GGUF files: read as they were written, and refused where transformers would read another model."""

import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from halo.errors import UserError
from halo.models.loading import check_architecture, find_teacher, load_teacher
from halo.models.tokenizer import load_tokenizer, tokenizer_hash
from halo.preset import load_config
from halo.run import content_digest
from hypenet.transfer import hybrid_config, hybrid_from_teacher

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from tests.halo.gguf_teacher import make_llama, write_gguf


@pytest.fixture(scope="module")
def llama(tokenizer):
    return make_llama(tokenizer)


@pytest.fixture(scope="module")
def file(tmp_path_factory, llama, tokenizer):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf", llama, tokenizer)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(constants.HF_HOME, "halo")


@pytest.fixture
def tokens():
    return torch.randint(0, 1024, (2, 40), generator=torch.Generator().manual_seed(0))


def test_the_teacher_is_what_was_written(file, llama, tokens):
    """In the file, and in the folder into which it is unpacked."""
    folder = find_teacher(str(file))
    check_architecture(folder, load_config("tiny"))
    for source in (file, folder):
        assert torch.equal(load_teacher(source).eval()(tokens).logits, llama(tokens).logits)
    assert tokenizer_hash(load_tokenizer(folder)) == tokenizer_hash(load_tokenizer(file))


def test_a_file_is_unpacked_once(file, llama, tokenizer, tmp_path, cache, monkeypatch):
    """Another file of the same name has a folder of its own."""
    folder = find_teacher(str(file))
    assert find_teacher(str(file)) == folder
    other = write_gguf(tmp_path / file.name, make_llama(tokenizer, num_hidden_layers=1), tokenizer)
    assert {folder, find_teacher(str(other))} <= set(cache.iterdir()) and find_teacher(str(other)) != folder
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be unpacked into .*/file/halo/llama-\w+ \(set HF_HOME\): "):
        find_teacher(str(file))


def test_the_hybrid_with_all_attention_is_the_teacher(file, tokens):
    teacher = load_teacher(file).eval()
    config = hybrid_config(teacher.config, range(2), attn_use_rope=True, attn_use_output_gate=False)
    assert torch.equal(hybrid_from_teacher(teacher, config)(tokens).logits, teacher(tokens).logits)
    assert "quantization_config" not in config.to_dict()


def test_the_tokenizer_ends_texts_as_the_file_says(file, tokenizer, tmp_path):
    read = load_tokenizer(file)
    assert (read.eos_token_id, read.bos_token_id) == (tokenizer.eos_token_id, 0)
    text = "It is a truth, naïve 漢字, 1234."
    assert read.decode(read(text, add_special_tokens=False)["input_ids"]) == text
    read.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(read)


def test_the_fingerprint_is_the_files(file, llama, tokenizer, tmp_path):
    same = write_gguf(tmp_path / "llama.gguf", llama, tokenizer)
    assert content_digest({"": file}) == content_digest({"": same})
    other = write_gguf(tmp_path / "other.gguf", make_llama(tokenizer, num_hidden_layers=1), tokenizer)
    assert content_digest({"": file}) != content_digest({"": other})


def test_no_file_and_no_gguf(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        find_teacher(str(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("It is a truth universally acknowledged")
    with pytest.raises(UserError, match="is not a whole GGUF file"):
        find_teacher(str(tmp_path / "text.gguf"))


def test_a_file_cut_short(file, tmp_path):
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is not a whole GGUF file"):
        find_teacher(str(short))


def test_what_transformers_would_leave_out(llama, tokenizer, tmp_path):
    """Its model would have other positions, or lack biases."""
    scaled = write_gguf(tmp_path / "scaled.gguf", llama, tokenizer, **{"rope.scaling.type": "yarn"})
    with pytest.raises(UserError, match="scales its RoPE"):
        find_teacher(str(scaled))
    biased = write_gguf(tmp_path / "biased.gguf", make_llama(tokenizer, attention_bias=True), tokenizer)
    with pytest.raises(UserError, match="has biases"):
        find_teacher(str(biased))


def test_an_architecture_that_cannot_be_converted(file, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes().replace(b"llama", b"falco"))
    with pytest.raises(UserError, match="is a 'falco'; supported: llama, mistral, qwen2, qwen3"):
        find_teacher(str(other))


def test_a_package_that_is_not_installed(file, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"llama\.gguf needs packages that are not installed: pip install gguf$"):
        find_teacher(str(file))
