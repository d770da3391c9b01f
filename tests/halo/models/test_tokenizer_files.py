"""Tokenizers as they are found: each is loaded with the ids of its files, or refused in one true line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from transformers import PreTrainedTokenizerFast

from halo.data.corpus import read_documents
from halo.errors import UserError
from halo.models.loading import find_teacher
from halo.models.tokenizer import load_tokenizer
from halo.models.tokenizer_files import SETTINGS
from tests.halo.tokenizer_kinds import KINDS
from tests.launcher.conftest import TEACHER

TEXT = "It is a truth.  x 12\n\nnaïve 漢字"
CONFIG = SETTINGS[0]
RAN = "raise SystemExit('code of the folder was run')"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(TEACHER, tmp_path / "teacher")
    return tmp_path / "teacher"


def write(file: Path, **keys: object) -> None:
    """Set keys of a table in JSON; None removes one."""
    table = json.loads(file.read_text()) | keys if file.is_file() else keys
    file.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))


def ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(TEXT)["input_ids"]


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return ids(load_tokenizer(TEACHER))


@pytest.mark.parametrize("tokens", [["<|a|>", "<|b|>"], [{"__type": "AddedToken", "content": "<|a|>"}, "<|b|>"]])
def test_extra_special_tokens_as_a_list(folder: Path, expected: list[int], tmp_path: Path, tokens: list) -> None:
    write(folder / CONFIG, extra_special_tokens=tokens)
    tokenizer = load_tokenizer(folder)
    assert ids(tokenizer) == expected
    assert {"<|a|>", "<|b|>"} <= set(tokenizer.all_special_tokens)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert {"<|a|>", "<|b|>"} <= set(load_tokenizer(tmp_path / "saved").all_special_tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True},
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": []},
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": None},
        {"tokenizer_class": "Qwen2Tokenizer", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}},
        {"extra_special_tokens": {"image_token": "<|endoftext|>"}},
    ],
)
def test_other_settings_of_the_same_tokenizer(folder: Path, expected: list[int], settings: dict) -> None:
    (folder / "own.py").write_text(RAN)
    write(folder / CONFIG, **settings)
    assert ids(load_tokenizer(folder)) == expected


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_byte_level_tokenizer_under_llama_s_class(folder: Path, expected: list[int], name: str, family: str) -> None:
    """transformers 5 built another one of it, and transformers 4 adds <s> and <unk> that the embedding has not."""
    write(folder / CONFIG, tokenizer_class=name)
    write(folder / "config.json", model_type=family)
    tokenizer = load_tokenizer(folder)
    assert ids(tokenizer) == expected
    assert len(tokenizer) == 1024


@pytest.mark.parametrize("kind", ["llama2", "mistral", "no_prefix", "unigram"])
def test_sentencepiece_in_tokenizer_json(folder: Path, corpus: Path, kind: str) -> None:
    for name in ("tokenizer.json", *SETTINGS[:2]):
        (folder / name).unlink()
    made = KINDS[kind](list(read_documents(corpus / "emma.txt", "train"))[:2])
    made.save_pretrained(folder)
    write(folder / "config.json", model_type="llama")
    if kind != "unigram":
        write(folder / CONFIG, tokenizer_class="LlamaTokenizer", legacy=kind == "llama2")
    found = load_tokenizer(folder)
    for text in (TEXT, f" {TEXT}"):
        assert found(text)["input_ids"] == made(text)["input_ids"]


def test_vocabulary_and_merges(folder: Path, expected: list[int]) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    write(folder / CONFIG, tokenizer_class="Qwen2Tokenizer")
    assert ids(load_tokenizer(folder)) == expected


def _lone(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / name).write_bytes(content)

    return change


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))  # type: ignore[func-returns-value]


def _keys(name: str, **keys: object) -> Callable[[Path], None]:
    return lambda folder: write(folder / name, **keys)


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "none": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer at {}: it has no tokenizer.json"),
    "tekken": (_lone("tekken.json", b"{}"), "no tokenizer at {}: it has no tokenizer.json (a tekken.json alone is"),
    "tiktoken": (_lone("tokenizer.model", b"IQ== 0\nIg== 1\n"), "{}/tokenizer.model is a vocabulary of tiktoken"),
    "unknown class": (_keys(CONFIG, tokenizer_class="NewTokenizer"), "has no tokenizer_class NewTokenizer: install"),
    "no class": (_keys(CONFIG, tokenizer_class=3), "tokenizer_class is 3, not the name of a class"),
    "remote code": (
        _keys(CONFIG, tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]}),
        "the tokenizer at {} (OwnTokenizer) needs code of its own, which is never run",
    ),
    "cut": (_bytes("tokenizer.json", lambda b: b[:5000]), "{}/tokenizer.json is not valid JSON, or cut off: "),
    "cut settings": (_bytes(CONFIG, lambda b: b[:50]), "{}/tokenizer_config.json is not valid JSON, or cut off: "),
    "HTML": (_bytes("tokenizer.json", lambda b: b"<!DOCTYPE html>"), "{}/tokenizer.json is a page of a website"),
    "empty": (_bytes("tokenizer.json", lambda b: b"\n"), "{}/tokenizer.json is empty: copy it again"),
    "BOM": (_bytes("tokenizer.json", lambda b: b"\xef\xbb\xbf" + b), "{}/tokenizer.json begins with a byte-order mark"),
    "UTF-16": (_bytes(CONFIG, lambda b: b.decode().encode("utf-16")), "{}/tokenizer_config.json begins with a byte"),
    "Latin-1": (
        _bytes(CONFIG, lambda b: b + b"\xe9"),
        "{}/tokenizer_config.json is not valid JSON, or cut off: 'utf-8'",
    ),
    "nested": (_bytes(CONFIG, lambda b: b"[" * 100_000), "{}/tokenizer_config.json is not valid JSON, or cut off: "),
    "a list": (_bytes("tokenizer.json", lambda b: b"[]"), "{}/tokenizer.json is not valid: its JSON is no table"),
    "no model": (_bytes("tokenizer.json", lambda b: b"{}"), "{}/tokenizer.json cannot be read by the installed tok"),
    "a new model": (_keys("tokenizer.json", model={"type": "New"}), "{}/tokenizer.json cannot be read by the install"),
    "a folder": (
        lambda folder: [(folder / "tokenizer.json").unlink(), (folder / "tokenizer.json").mkdir()],  # type: ignore[dict-item, return-value]
        "no tokenizer at {}: it has no tokenizer.json",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_loaded(folder: Path, name: str) -> None:
    (folder / "own.py").write_text(RAN)
    change, line = WRONG[name]
    change(folder)
    for load in (load_tokenizer, find_teacher):
        with pytest.raises(UserError) as error:
            load(str(folder))
        assert line.format(folder) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_configuration_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("<html>")
    with pytest.raises(UserError, match=r"config\.json is a page of a website, not JSON"):
        find_teacher(str(folder))


def test_a_tokenizer_model_without_what_reads_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _lone("tokenizer.model", b"\x0a\x0e\x0a")(folder)
    monkeypatch.setattr("halo.models.tokenizer_files.find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"not installed \(sentencepiece, protobuf\): pip install 'hypenet-halo\[sent"):
        load_tokenizer(folder)


class TestSentencePiece:
    """A tokenizer.model alone. What the installed transformers makes of it has its ids, or is refused."""

    @pytest.fixture
    def train(self, folder: Path, corpus: Path) -> Callable[..., object]:
        sentencepiece = pytest.importorskip("sentencepiece")

        def train(**options: object) -> object:
            for name in ("tokenizer.json", *SETTINGS[:2]):
                (folder / name).unlink()
            defaults = {"model_type": "bpe", "byte_fallback": True, "split_digits": True}
            defaults |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
            sentencepiece.SentencePieceTrainer.train(
                input=str(corpus / "emma.txt"),
                model_prefix=str(folder / "tokenizer"),
                vocab_size=1000,
                minloglevel=2,
                **defaults | options,
            )
            write(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
            return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

        return train

    @pytest.mark.parametrize("legacy", [True, False])
    def test_llama_s(self, folder: Path, train: Callable, tmp_path: Path, legacy: bool) -> None:
        original = train()
        write(folder / CONFIG, tokenizer_class="LlamaTokenizer", legacy=legacy)
        found = load_tokenizer(folder)
        assert ids(found) == [original.bos_id(), *original.encode(TEXT)]
        assert found.eos_token_id == original.eos_id()
        found.save_pretrained(tmp_path / "saved")
        assert ids(load_tokenizer(tmp_path / "saved")) == ids(found)

    @pytest.mark.parametrize(
        "options",
        [
            {"model_type": "unigram"},
            {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
            {"add_dummy_prefix": False},
            {"treat_whitespace_as_suffix": True},
            {"user_defined_symbols": ["<|user|>", "  "]},
        ],
    )
    def test_others_are_the_same_or_refused(self, folder: Path, train: Callable, options: dict) -> None:
        original = train(**options)
        write(folder / CONFIG, tokenizer_class="LlamaTokenizer")
        try:
            assert ids(load_tokenizer(folder))[1:] == original.encode(TEXT)
        except UserError as error:
            assert f"transformers {transformers.__version__} makes a tokenizer with other ids of" in str(error)

    def test_without_settings(self, folder: Path, train: Callable) -> None:
        original = train()
        if transformers.__version__.startswith("5.17"):  # of the Llama family, without a word of the tokenizer's class
            pytest.skip("makes a tokenizer without the space before a text, which is refused")
        assert ids(load_tokenizer(folder)) == [original.bos_id(), *original.encode(TEXT)]

    def test_a_damaged_one(self, folder: Path, train: Callable) -> None:
        train()
        (folder / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes()[:999])
        with pytest.raises(UserError, match=r"tokenizer\.model is no whole model of SentencePiece: "):
            load_tokenizer(folder)
