"""Whatever stands in a file of JSON, reading it gives its content or one line. All in one process.

Each file is cut, emptied, put in another encoding, and has a value of another type at each of its places.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from halo.data.shards import verify_shards, write_shards
from halo.data.stream import TokenStream
from halo.errors import UserError
from halo.models.folders import WEIGHTS_INDEX, weight_files
from halo.models.generation import read_generation
from halo.models.loading import _check_folder, check_architecture
from halo.models.tokenizer import load_tokenizer
from halo.preset import load_config
from halo.run import StageFolder
from halo.status import status_text
from halo.tables import config_table, to_toml
from halo.training.checkpoint import FILE_LIST, STATE, Checkpoints, TrainingState, _State, _write_json
from halo.training.engine import complete_ds_config, read_ds_config
from tests.launcher.conftest import ROOT

TINY = load_config("tiny")
OTHERS: list[Any] = [None, True, -1, 1.5, "x", [], {"x": 1}]


def damaged(content: bytes) -> Iterator[bytes]:
    """A file of JSON, damaged in every way."""
    yield from (b"", b"\n", b"\xff", b"<html>", b"[" * 100_000)
    yield from (b"\xef\xbb\xbf" + content, content.decode().encode("utf-16"))
    yield from (content[:1], content[: len(content) // 2], content[:-2], content[:-2] + b"\xff" + content[-2:])
    yield from (json.dumps(other).encode() for other in OTHERS)
    value = json.loads(content)
    for place in places(value):
        for other in OTHERS:
            yield json.dumps(changed(value, place, other)).encode()


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value. The first of a list stands for all."""
    keys = list(value) if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else []
    for key in keys:
        yield (key,)
        yield from ((key, *rest) for rest in places(value[key]))


def changed(value: Any, place: tuple[Any, ...], other: Any) -> Any:
    if not place:
        return other
    copy = value.copy()
    copy[place[0]] = changed(value[place[0]], place[1:], other)
    return copy


def check(path: Path, read: Callable[[], object]) -> None:
    """Read a file as it is, then each damaged form of it."""
    content = path.read_bytes()
    read()
    for other in damaged(content):
        path.write_bytes(other)
        try:
            read()
        except UserError as error:
            assert len(str(error).splitlines()) == 1, other[:200]
        except Exception as error:
            pytest.fail(f"{path.name}: {type(error).__name__}: {error}\n{other[:2000]!r}")
    path.write_bytes(content)


def test_a_deepspeed_config(tmp_path):
    path = tmp_path / "ds.json"
    more = {"comms_logger": {"enabled": True}, "timers": {"throughput": {"enabled": False}}, "steps_per_print": 5}
    path.write_text(json.dumps(json.loads((ROOT / "ds_configs" / "zero3_offload.json").read_text()) | more))
    check(path, lambda: complete_ds_config(read_ds_config(path), TINY.align))


def test_a_teacher(tmp_path):
    teacher = shutil.copytree(TINY.teacher, tmp_path / "teacher")
    check(teacher / "config.json", lambda: (_check_folder(teacher), check_architecture(teacher, TINY)))
    check(teacher / "generation_config.json", lambda: read_generation(teacher))
    check(teacher / "tokenizer_config.json", lambda: load_tokenizer(teacher))
    (teacher / "model.safetensors").rename(teacher / "one.safetensors")
    (teacher / WEIGHTS_INDEX).write_text('{"metadata": {}, "weight_map": {"a": "one.safetensors"}}')
    check(teacher / WEIGHTS_INDEX, lambda: weight_files(teacher))


def test_a_tokenizer(tmp_path):
    """A small one with a part of each kind: each place of it is damaged."""
    teacher = shutil.copytree(TINY.teacher, tmp_path / "teacher")
    small = Tokenizer(BPE(vocab={"a": 0, "b": 1, "ab": 2, "<s>": 3}, merges=[("a", "b")], unk_token="<s>"))
    small.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "b")])
    small.pre_tokenizer = Split(Regex("a+"), "isolated")
    small.decoder = ByteLevel()
    small.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    small.add_special_tokens(["<s>"])
    small.save(str(teacher / "tokenizer.json"))
    (teacher / "tokenizer_config.json").unlink()
    token = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    (teacher / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": token}))
    (teacher / "added_tokens.json").write_text('{"<s>": 3}')
    for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
        check(teacher / name, lambda: load_tokenizer(teacher))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    write_shards(folder, [np.arange(8, dtype=np.uint16)] * 4, {"tokenizer": "x"})
    return folder


def stream(shards: Path) -> TokenStream:
    verify_shards(shards, "x", 8)
    return TokenStream(shards, micro_batch=1, seed=0, rank=0, world_size=1)


def test_shards(shards):
    manifest, index = shards / "manifest.json", shards / "index.json"
    check(manifest, lambda: stream(shards))
    content = json.loads(manifest.read_text())

    def read_index() -> None:  # its digest agrees with it, as an author of shards can have it
        content["sha256"][index.name] = hashlib.sha256(index.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(content))
        stream(shards)

    check(index, read_index)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a finished stage, and a checkpoint of the next."""
    run = tmp_path / "run"
    align = StageFolder(run / "align", {"lr": 1.0})
    align.save_bytes("x.bin", b"1")
    align.complete(["x.bin"], {"loss": 1.0, "seconds": 2.0})
    (run / "config.toml").write_text(to_toml(config_table(TINY)))
    checkpoint = run / "distill" / "checkpoints" / "step-000000004"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    progress = TrainingState(step=4, loss=1.0, stream={"consumed": 1, "seed": 0, "samples": 4})
    state = _State(made_from={"lr": 1.0}, ranks=1, zero_stage=1, progress=progress)
    _write_json(checkpoint / FILE_LIST, {STATE: _write_json(checkpoint / STATE, asdict(state))})
    return run


def test_a_finished_stage(run):
    stage = StageFolder(run / "align", {"lr": 1.0})
    check(stage.record_path, lambda: (status_text(run), stage.is_complete(), stage.digest()))


def test_a_checkpoint(run, shards):
    folder = run / "distill" / "checkpoints"
    file_list, state = folder / "step-000000004" / FILE_LIST, folder / "step-000000004" / STATE
    checkpoints = Checkpoints(folder, {"lr": 1.0}, TINY.distill)
    check(file_list, lambda: checkpoints._choose(1))

    def read_state() -> None:  # its digest agrees with it
        content = state.read_bytes()
        listed = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        file_list.write_text(json.dumps({STATE: listed}))
        chosen = checkpoints._choose(1)
        assert chosen is not None
        stream(shards).load_state_dict(chosen.state.stream)

    check(state, read_state)
    check(state, lambda: status_text(run))


def test_the_status_of_a_run_with_damaged_files(run):
    metrics, latest = run / "distill" / "metrics.jsonl", run / "distill" / "checkpoints" / "latest"
    line = {"step": 4, "loss": 1.0, "tokens_per_s": 2.0, "step_s": 0.1}
    for place in places(line):
        for other in OTHERS:
            metrics.write_text(json.dumps(changed(line, place, other)) + "\n")
            try:
                status_text(run)
            except UserError as error:
                assert str(error).startswith(f"a line of {metrics} is not valid: {place[0]}: ")
                assert str(error).endswith("the stage's next start repairs it")
    metrics.write_text(json.dumps(line) + "\n")
    for content in (b"", b"\xff", b"step-x", b"../.."):
        latest.write_bytes(content)
        with pytest.raises(UserError, match="latest names no checkpoint: remove it"):
            status_text(run)
    for content in (b"\xff", b"[", b"steps = 3", b'[distill]\nsteps = "3"', b""):
        (run / "config.toml").write_bytes(content)
        with pytest.raises(UserError, match=r"config\.toml"):
            status_text(run)


def test_json_is_read_in_one_place():
    """But for the lines of texts, which have rows, and what processes and libraries say to each other."""
    found = [path for path in (ROOT / "halo").rglob("*.py") if "json.load" in path.read_text()]
    names = {str(path.relative_to(ROOT / "halo")) for path in found}
    assert names == {
        "data/formats.py",
        "data/locks.py",
        "models/tokenizer.py",
        "teacher/dedicated.py",
        "training/metrics.py",
    }
