"""Stages are made from what is behind a path: another content there is another input."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from halo.context import Context
from halo.data.contents import contents_of
from halo.data.shards import write_shards
from halo.data.stage_shards import ensure_shards
from halo.errors import UserError
from halo.graph import HELD_OUT_TEXT, TRAINING_DATA
from halo.job import Job
from halo.preset import load_config


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Stage 1 trains on a text, stage 2 on shards, and selection measures on a folder of texts."""
    (tmp_path / "text.txt").write_text("It is a truth. " * 100)
    (tmp_path / "held").mkdir()
    for name in "ab":
        (tmp_path / "held" / f"{name}.jsonl").write_text('{"text": "One."}\n' * 20)
    shards(tmp_path, 0)
    changes = ["--align.corpus.source", str(tmp_path / "text.txt"), "--distill.shards", str(tmp_path / "shards")]
    config = load_config("tiny", [*changes, "--heldout", str(tmp_path / "held")])
    return Job(config=config, run=tmp_path / "run", ds_config=Path(), stages=("distill",))


def shards(folder: Path, token: int) -> None:
    write_shards(folder / "shards", [np.full(8, token, np.uint16)], {"tokenizer": "none"})


def test_what_is_behind_each_path(job: Job, tmp_path: Path) -> None:
    whole = contents_of(job)
    assert whole.keys() == {"align", "distill", HELD_OUT_TEXT}
    text = tmp_path / "text.txt"
    text.write_text(text.read_text()[:700] + "x" + text.read_text()[701:])
    assert {name for name, digest in contents_of(job).items() if digest != whole[name]} == {"align"}
    held = tmp_path / "held" / "b.jsonl"
    held.write_text(held.read_text().replace("One", "Two"))
    (tmp_path / "shards").rename(tmp_path / "old")
    shards(tmp_path, 1)
    assert not set(contents_of(job).values()) & set(whole.values())
    text.unlink()
    held.write_text("{")
    assert contents_of(job).keys() == {"distill"}


def test_a_finished_stage_stands_where_its_text_is_gone(job: Job, tmp_path: Path) -> None:
    def context() -> Context:
        return Context(
            config=job.config,
            run=job.run,
            teacher=Path(),
            ds_config={},
            attention={},
            contents=contents_of(job),
        )

    folder = context().folder("align")
    assert folder.made_from[TRAINING_DATA] == context().contents["align"]
    folder.complete([], {})
    assert context().is_complete("align")
    (tmp_path / "text.txt").rename(tmp_path / "away.txt")
    assert context().is_complete("align")
    (tmp_path / "text.txt").write_text("Another.")
    with pytest.raises(UserError, match=r"align was made from another training data: remove that folder"):
        context().is_complete("align")


def test_shards_of_a_text_that_has_changed(job: Job, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\nCHAPTER I\n\nIt is a truth." * 300)
    corpus = replace(job.config.align.corpus, samples=8, needles=0.0)
    align = replace(job.config.align, seq_len=64, batch=4, micro_batch=4, corpus=corpus)
    before = contents_of(job)
    ensure_shards(align, "align", job.run / "data" / "align", tokenizer)
    assert contents_of(job) == before
    (tmp_path / "text.txt").write_text("\n\nCHAPTER I\n\nIt is no truth." * 300)
    with pytest.raises(UserError, match=r"align was not prepared from the text that .*text.txt holds now: remove it"):
        ensure_shards(align, "align", job.run / "data" / "align", tokenizer)
    (tmp_path / "text.txt").unlink()
    ensure_shards(align, "align", job.run / "data" / "align", tokenizer)
