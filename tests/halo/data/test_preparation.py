"""One pass over a text makes every stage's shards: no token lost, no document shared, the same bytes however it ran."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from halo.data.corpus import cut, read_documents, read_piece
from halo.data.locks import TaskLock
from halo.data.packing import Part
from halo.data.preparation import prepare
from halo.data.shards import verify_shards
from halo.errors import UserError
from halo.models.tokenizer import tokenizer_hash
from halo.run import sha256
from tests.halo.data.reading import read_samples

ROOT = Path(__file__).parents[3]
PARTS = {"align": Part(seq_len=32, tokens=3000), "finetune": Part(seq_len=256, tokens=6000)}
PIECE = 4000
DOCUMENTS = 400


@pytest.fixture(scope="module")
def source(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet in FineWeb-Edu's schema, and .jsonl: documents that are all different, except that one is there twice."""
    words = (corpus / "persuasion.txt").read_text().split()
    rng = np.random.default_rng(0)
    texts = [f"{i} " + " ".join(words[i * 40 : i * 40 + rng.integers(5, 60)]) for i in range(DOCUMENTS - 1)]
    texts.append(texts[0])
    folder = tmp_path_factory.mktemp("source")
    table = pa.table({"text": texts[:300], "id": [str(i) for i in range(300)], "int_score": [3] * 300})
    pq.write_table(table, folder / "000_00000.parquet", row_group_size=25)
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[300:]))
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "shards"
    _prepare(source, tokenizer, folder)
    return folder


def _prepare(source: Path, tokenizer: PreTrainedTokenizerFast, folder: Path, **settings: Any) -> dict[str, Any] | None:
    settings = {"whole": True, "held_out": 0.1, "workers": 2, "piece_bytes": PIECE} | settings
    return prepare(source, tokenizer, folder, settings.pop("parts", PARTS), source_name="mine", **settings)


def _digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _texts(shards: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The documents of shards whose samples are in the order of the text."""
    return tokenizer.decode(read_samples(shards).flatten()).split(tokenizer.eos_token)


def test_pieces_hold_every_document_once(source: Path) -> None:
    pieces = cut(source, PIECE)
    assert len(pieces) > 10
    assert all(size >= PIECE for _, size in pieces[:-1])
    documents = [text for part in ("train", "held_out") for text in read_documents(source, part)]  # type: ignore[arg-type]
    assert Counter(text for piece, _ in pieces for text in read_piece(piece)) == Counter(documents)


def test_no_token_is_lost(whole: Path, source: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    held_out = list(read_documents(whole / "held_out", "held_out"))
    train = Counter(text for piece, _ in cut(source, PIECE) for text in read_piece(piece)) - Counter(held_out)
    expected: Counter[int] = Counter()
    for text, times in train.items():
        for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]:
            expected[token] += times
    written: Counter[int] = Counter()
    left_over = 0
    for name, part in PARTS.items():
        manifest = verify_shards(whole / name, tokenizer_hash(tokenizer), part.seq_len)
        assert manifest["separator"] == tokenizer.eos_token_id
        assert manifest["tokens_left_over"] < part.seq_len
        samples = read_samples(whole / name)
        assert samples.shape == (manifest["samples"], part.seq_len)
        written.update(samples.flatten().tolist())
        left_over += manifest["tokens_left_over"]
    assert not written - expected
    assert (expected - written).total() == left_over


def test_what_has_no_text_is_skipped_and_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A piece that was written before they were counted counts none."""
    (tmp_path / "source").mkdir()
    texts = [f"{i} one two three four five six" for i in range(60)]
    lines = [json.dumps({"text": text}) for text in [*texts[:30], None, "", " "]]
    (tmp_path / "source" / "a.jsonl").write_text("\n".join([*lines, ""]) + "\n")
    (tmp_path / "source" / "b.txt").write_text(" \n")
    pq.write_table(pa.table({"text": [*texts[30:], None]}), tmp_path / "source" / "c.parquet")
    done = _prepare(tmp_path / "source", tokenizer, tmp_path / "shards", piece_bytes=200)
    assert done is not None
    assert [done[name]["skipped"] for name in PARTS] == [6, 6]
    held_out = json.loads((tmp_path / "shards" / "held_out" / "held_out.json").read_text())
    assert held_out["skipped"] == 6
    assert held_out["documents"] + sum(done[name]["documents"] for name in PARTS) == 60


def test_a_preparation_that_an_older_version_began(
    source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records do not say what was skipped."""
    monkeypatch.setattr("halo.data.preparation._Pieces.finish", lambda pieces: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _prepare(source, tokenizer, tmp_path / "shards")
    monkeypatch.undo()
    for path in (tmp_path / "shards" / "preparation").glob("0*.json"):
        record = json.loads(path.read_text())
        record.pop("skipped")
        path.write_text(json.dumps(record))
    done = _prepare(source, tokenizer, tmp_path / "shards")
    assert done is not None and done["align"]["skipped"] == 0


@pytest.mark.parametrize("settings", [{"whole": True}, {"whole": False}])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"source is too small|holds about 0 tokens"):
        _prepare(tmp_path / name, tokenizer, tmp_path / "shards", **settings)


def test_no_document_is_in_two_parts(whole: Path, source: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each begins with its number, if no sample was cut there; the source has the first one twice."""
    held_out = list(read_documents(whole / "held_out", "held_out"))
    assert 20 < len(held_out) < 70
    assert not list(read_documents(whole / "held_out", "train"))
    parts = [set(held_out), *(set(_texts(whole / name, tokenizer)) for name in PARTS)]
    known = set(read_documents(source, "train")) | set(read_documents(source, "held_out"))
    inside = [part & known for part in parts]
    assert all(len(part) > 10 for part in inside)
    assert len(set.union(*inside)) == sum(len(part) for part in inside)


def test_shares_are_the_tokens_asked_for(whole: Path) -> None:
    tokens = {
        name: json.loads((whole / name / "manifest.json").read_text())["samples"] * p.seq_len
        for name, p in PARTS.items()
    }
    assert 1.4 < tokens["finetune"] / tokens["align"] < 2.8


def test_bytes_do_not_depend_on_workers_tasks_or_order(
    whole: Path, source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    _prepare(source, tokenizer, tmp_path / "one", workers=1)
    for task in (2, 0):
        assert _prepare(source, tokenizer, tmp_path / "three", task=task, tasks=3) is None
    assert _prepare(source, tokenizer, tmp_path / "three", task=1, tasks=3) is not None
    assert _digests(tmp_path / "one") == _digests(tmp_path / "three") == _digests(whole)


def test_another_seed_is_another_choice(
    whole: Path, source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    _prepare(source, tokenizer, tmp_path / "other", seed=1)
    assert set(_texts(tmp_path / "other" / "align", tokenizer)) != set(_texts(whole / "align", tokenizer))


def test_as_much_as_is_needed_and_no_more(
    whole: Path, source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """However many pieces were under way when it was enough."""
    for name, workers in (("a", 1), ("b", 4)):
        manifests = _prepare(source, tokenizer, tmp_path / name, whole=False, workers=workers)
        assert manifests is not None
        for part, wanted in PARTS.items():
            assert manifests[part]["samples"] * wanted.seq_len >= wanted.tokens
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    assert len(_digests(tmp_path / "a")) < len(_digests(whole))


def test_zstd(whole: Path, source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    _prepare(source, tokenizer, tmp_path / "small", compression="zstd")
    assert not list(tmp_path.rglob("*.mds"))
    assert len(list(tmp_path.rglob("*.mds.zstd"))) == len(list(whole.rglob("*.mds")))


def test_special_tokens_written_in_a_text_are_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = f"Before {tokenizer.eos_token} after. " * 5
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    part = {"align": Part(seq_len=8, tokens=1)}
    manifests = _prepare(tmp_path / "a.jsonl", tokenizer, tmp_path / "shards", parts=part, held_out=0.0)
    assert manifests is not None
    boundaries = (read_samples(tmp_path / "shards" / "align") == manifests["align"]["separator"]).sum()
    assert boundaries <= 1  # its end


def test_it_resumes_only_with_the_settings_it_began_with(
    source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    _prepare(source, tokenizer, tmp_path / "shards")
    before = _digests(tmp_path / "shards")
    _prepare(source, tokenizer, tmp_path / "shards")  # it is complete
    with pytest.raises(UserError, match=r"from another seed \(0, now 1\): remove it"):
        _prepare(source, tokenizer, tmp_path / "shards", seed=1)
    with pytest.raises(UserError, match="holds other files"):
        _prepare(source, tokenizer, tmp_path)
    assert _digests(tmp_path / "shards") == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"parts": {"align": Part(seq_len=32, tokens=10**6)}, "whole": False},
            r"holds about [\d,]+ tokens, and 1,000,000",
        ),
        ({"parts": {"align": Part(seq_len=10**6, tokens=1)}}, "not one full sample of 1000000 tokens for align"),
        ({"task": 2, "tasks": 2}, "tasks count from 0"),
    ],
)
def test_what_cannot_be(
    source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _prepare(source, tokenizer, tmp_path / "shards", **settings)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_full_disk_loses_nothing(
    whole: Path, source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Stood in for by the largest file that this process may write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(UserError, match=r"shards/.*: File too large; mend that, and type the same command again"):
            _prepare(source, tokenizer, tmp_path / "shards")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("manifest.json"))
    _prepare(source, tokenizer, tmp_path / "shards")
    assert _digests(tmp_path / "shards") == _digests(whole)


@pytest.fixture
def running(source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Somebody who works on the folder, until stopped."""
    code = (
        "import sys, time; from pathlib import Path; from halo.data.locks import TaskLock\n"
        "lock = TaskLock(Path(sys.argv[1]), 0, 2); print('held', flush=True); time.sleep(60)"
    )
    (tmp_path / "shards" / "preparation").mkdir(parents=True)
    environment = os.environ | {"SLURM_JOB_ID": "17"}
    command = [sys.executable, "-c", code, str(tmp_path / "shards" / "preparation")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("tasks", [2, 3])
def test_two_jobs_on_one_folder(
    source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, running: subprocess.Popen[str], tasks: int
) -> None:
    """Refused as long as the other lives, and no longer."""
    who = rf"another process works on {tmp_path}/shards \(job 17, process {running.pid} on {os.uname().nodename}\)"
    with pytest.raises(UserError, match=who):
        _prepare(source, tokenizer, tmp_path / "shards", tasks=tasks)
    another = TaskLock(tmp_path / "shards" / "preparation", 1, 2)  # of the same division
    assert not another.is_alone()
    another.release()
    running.kill()
    running.wait()
    assert _prepare(source, tokenizer, tmp_path / "shards", tasks=tasks) is None


def test_workers_end_with_their_parent(source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    large = tmp_path / "large.jsonl"
    large.write_text((source / "more.jsonl").read_text() * 500)
    command = [
        sys.executable,
        "data/prepare_fineweb_edu.py",
        "--preset",
        "tiny",
        "--teacher",
        str(tmp_path / "tokenizer"),
    ]
    command += ["--source", str(large), "--out", str(tmp_path / "shards"), "--whole", "--workers", "2"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        children: list[int] = []
        while len(children) < 2:
            assert process.poll() is None, process.stderr and process.stderr.read()
            children = [
                int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ]
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
