"""Shards hold every token once, are whole or not there, and are refused when they are not what they should be."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from halo.data.corpus import HELD_OUT_MARK, read_documents
from halo.data.needle import EVAL_KEYS, TRAIN_KEYS
from halo.data.shards import SHARDS_MANIFEST, prepare_shards, verify_shards, write_shards
from halo.data.stage_shards import ensure_shards
from halo.errors import UserError
from halo.graph import STAGES
from halo.models.tokenizer import tokenizer_hash
from halo.preset import load_config
from tests.halo.data.reading import read_samples


def _samples(count: int, length: int = 8) -> Iterator[np.ndarray]:
    return iter(np.arange(count * length, dtype=np.uint16).reshape(count, length))


@pytest.fixture
def novel(corpus: Path) -> Path:
    return corpus / "persuasion.txt"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", _samples(100), {"tokenizer": "mine"})
    return tmp_path / "shards"


def test_write_and_verify(shards: Path) -> None:
    manifest = verify_shards(shards, "mine", 8)
    assert (manifest["samples"], manifest["seq_len"], manifest["dtype"]) == (100, 8, "uint16")
    assert read_samples(shards).flatten().tolist() == list(range(800))


def test_large_vocabularies_take_32_bits(tmp_path: Path) -> None:
    samples = [np.array([151_935, 0], np.uint32), np.array([7, 70_000], np.uint32)]
    assert write_shards(tmp_path / "wide", samples, {})["dtype"] == "uint32"
    assert read_samples(tmp_path / "wide").tolist() == [[151_935, 0], [7, 70_000]]


def test_an_interrupted_run_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield from _samples(10)
        raise UserError("the source ends here")

    with pytest.raises(UserError, match="the source ends here"):
        write_shards(tmp_path / "shards", broken(), {})
    assert not (tmp_path / "shards").exists()
    write_shards(tmp_path / "shards", _samples(20), {"tokenizer": "mine"})
    assert verify_shards(tmp_path / "shards", "mine", 8)["samples"] == 20
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_shards_are_never_overwritten(shards: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        write_shards(shards, _samples(1), {})
    assert verify_shards(shards, "mine", 8)["samples"] == 100


def test_no_samples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the source is too small"):
        write_shards(tmp_path / "shards", [], {})
    assert not list(tmp_path.iterdir())


def _truncate(folder: Path) -> None:
    shard = folder / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-100])


def _alter(folder: Path) -> None:
    shard = folder / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def _edit_manifest(folder: Path) -> None:
    manifest = json.loads((folder / SHARDS_MANIFEST).read_text())
    del manifest["sha256"]
    (folder / SHARDS_MANIFEST).write_text(json.dumps(manifest))


def test_an_altered_shard_is_found_when_it_is_read(shards: Path) -> None:
    """And not before: a start does not read everything."""
    _alter(shards)
    verify_shards(shards, "mine", 8)
    with pytest.raises(UserError, match=r"shard.00000.mds is truncated or altered; remove .* and prepare it anew"):
        read_samples(shards)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "shard.00000.mds is truncated or altered"),
        (lambda folder: (folder / "shard.00000.mds").unlink(), "shard.00000.mds is missing"),
        (lambda folder: (folder / "index.json").unlink(), "index.json is missing"),
        (lambda folder: (folder / SHARDS_MANIFEST).unlink(), "holds no token shards"),
        (lambda folder: (folder / SHARDS_MANIFEST).write_text("{"), "manifest.json is not valid"),
        (_edit_manifest, "manifest.json is not valid"),
    ],
)
def test_damage_is_found(shards: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(shards)
    with pytest.raises(UserError, match=message):
        verify_shards(shards, "mine", 8)


def test_shards_for_something_else_are_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="made with another tokenizer"):
        verify_shards(shards, "yours", 8)
    with pytest.raises(UserError, match="samples of 8 tokens, not 16"):
        verify_shards(shards, "mine", 16)
    with pytest.raises(UserError, match="holds no token shards"):
        verify_shards(shards / "none", "mine", 8)
    with pytest.raises(UserError, match="holds no token shards"):
        verify_shards(shards / "index.json", "mine", 8)


def test_one_pass_holds_every_document(tokenizer: PreTrainedTokenizerFast, novel: Path, tmp_path: Path) -> None:
    manifest = prepare_shards(novel, tokenizer, tmp_path / "shards", seq_len=128, seed=0)
    ids = tokenizer(list(read_documents(novel, "train")))["input_ids"]
    tokens = sum(len(document) + 1 for document in ids)
    assert manifest["samples"] * 128 + manifest["tokens_left_over"] == tokens
    written = read_samples(tmp_path / "shards")
    assert (written == tokenizer.eos_token_id).sum() in (len(ids), len(ids) - 1)
    assert verify_shards(tmp_path / "shards", tokenizer_hash(tokenizer), 128) == manifest


def test_more_samples_than_one_pass(tokenizer: PreTrainedTokenizerFast, novel: Path, tmp_path: Path) -> None:
    once = prepare_shards(novel, tokenizer, tmp_path / "once", seq_len=512, seed=0)["samples"]
    count = 2 * once + 3
    assert prepare_shards(novel, tokenizer, tmp_path / "more", seq_len=512, seed=0, samples=count)["samples"] == count
    samples = read_samples(tmp_path / "more")
    assert len(samples.unique(dim=0)) == count  # another order each time around


def test_mixture_of_needles_and_text(tokenizer: PreTrainedTokenizerFast, novel: Path, tmp_path: Path) -> None:
    prepare_shards(novel, tokenizer, tmp_path / "shards", seq_len=256, seed=3, samples=200, needle_fraction=0.5)
    texts = [tokenizer.decode(sample) for sample in read_samples(tmp_path / "shards")]
    needles = [text for text in texts if text.startswith("A special magic")]
    assert 70 < len(needles) < 130
    for text in needles:
        key, answer = text.rsplit("The special magic ")[-1].split(" mentioned in the provided text is ")
        assert key.split(" for ")[1] in TRAIN_KEYS
        assert text.count(answer) == 2
    assert not any(key in text for key in EVAL_KEYS for text in texts)


def test_seed_decides_everything(tokenizer: PreTrainedTokenizerFast, novel: Path, tmp_path: Path) -> None:
    first, second, third = (
        prepare_shards(novel, tokenizer, tmp_path / name, seq_len=256, seed=seed, samples=50, needle_fraction=0.5)[
            "sha256"
        ]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == second != third


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"needle_fraction": 1.5}, "from 0 to 1"),
        ({"needle_fraction": 1.0}, "give a number of samples"),
        ({"needle_fraction": 0.5, "seq_len": 64}, "no room for a haystack"),
        ({"samples": 0}, "at least 1"),
        ({"seq_len": 10**7}, "the source is too small"),
    ],
)
def test_impossible_settings(
    tokenizer: PreTrainedTokenizerFast, novel: Path, tmp_path: Path, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare_shards(novel, tokenizer, tmp_path / "shards", **({"seq_len": 256, "seed": 0} | settings))  # type: ignore[arg-type]
    assert not (tmp_path / "shards").exists()


def test_nothing_to_train_on(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("One document.")
    (tmp_path / HELD_OUT_MARK).write_text("{}")
    with pytest.raises(UserError, match="has no text to train on: every document is empty or held out"):
        prepare_shards(tmp_path, tokenizer, tmp_path / "shards", seq_len=8, seed=0)


def test_needles_of_another_recipe_are_not_trained_on(
    tokenizer: PreTrainedTokenizerFast, novel: Path, tmp_path: Path
) -> None:
    preset = load_config("tiny").align
    corpus = replace(preset.corpus, source=str(novel), samples=8, needles=0.5)
    align = replace(preset, seq_len=256, batch=4, micro_batch=4, corpus=corpus)
    folder = tmp_path / "shards"
    assert ensure_shards(align, "align", folder, tokenizer) == folder
    manifest = json.loads((folder / SHARDS_MANIFEST).read_text())
    assert manifest["needle_recipe"] == 2
    for older in (manifest | {"needle_recipe": 1}, {k: v for k, v in manifest.items() if k != "needle_recipe"}):
        (folder / SHARDS_MANIFEST).write_text(json.dumps(older))
        with pytest.raises(UserError, match=r"prepared with needle_recipe = (1|None), now 2: remove it"):
            ensure_shards(align, "align", folder, tokenizer)
    # Where no sample is a needle, the recipe does not matter.
    (folder / SHARDS_MANIFEST).write_text(json.dumps(manifest | {"needle_recipe": 1, "needle_fraction": 0.0}))
    assert ensure_shards(replace(align, corpus=replace(corpus, needles=0.0)), "align", folder, tokenizer) == folder


def test_stages_that_measure_needles_see_their_recipe() -> None:
    assert {name for name, stage in STAGES.items() if "needles" in stage.sees} == {"niah", "scaling", "selection"}
