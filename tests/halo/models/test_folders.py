"""What is fetched of a teacher on the hub, by the hub's own client from a server on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from halo.errors import UserError
from halo.models.folders import fetch_small_files, fetch_weights, weight_files
from halo.models.loading import find_teacher
from halo.models.tokenizer import load_tokenizer
from halo.pipeline import _fingerprint
from tests.halo.hub import COMMIT, hub
from tests.launcher.conftest import TEACHER

ELSE = (
    *("consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "original/model.safetensors"),
    *("original/params.json", "original/tokenizer.model", "onnx/model.onnx", "metal/model.bin", "onnx/vocab.json"),
    *("modeling_own.py", "README.md", "model.gguf", "tf_model.h5", "picture.png"),
)
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SCRIPT = """
import sys
from halo.models.loading import find_teacher, load_teacher
from halo.models.tokenizer import load_tokenizer

teacher = find_teacher(sys.argv[1])
load_teacher(teacher)
load_tokenizer(teacher).save_pretrained(sys.argv[2])
print(teacher)
"""


def loaded(address: str, home: Path, out: Path, **variables: str) -> Path:
    """SCRIPT in a process of its own: the hub's client reads its variables once. Returns the teacher's folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "someone/teacher", str(out)],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture
def fetched(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """This process asks a hub of `published`: the files that it fetches."""
    with hub(published, gated={"someone/gated"}) as (address, files):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        there = partial(snapshot_download, endpoint=address, cache_dir=tmp_path / "cache")
        monkeypatch.setattr("halo.models.folders.snapshot_download", there)
        yield files


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder of models, and in it a teacher with all that is found beside one."""
    folder = tmp_path / "models"
    model = folder / "someone" / "teacher"
    shutil.copytree(TEACHER, model)
    for name in ELSE:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("{}")
    (model / "additional_chat_templates").mkdir()
    (model / "chat_template.jinja").write_text(CHAT)
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}" + CHAT)
    return folder


def test_all_that_belongs_to_a_teacher_is_fetched_and_nothing_else(published: Path, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    with hub(published) as (address, files):
        teacher = loaded(address, home, out)
        assert teacher.name == COMMIT
        belongs = {str(p.relative_to(TEACHER)) for p in TEACHER.rglob("*") if p.is_file()}
        belongs |= {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
        assert Counter(files) == Counter(belongs)
        assert (out / "chat_template.jinja").read_text() == CHAT
        assert (out / "additional_chat_templates" / "tool_use.jinja").is_file()
    # Without the hub, it is found where it was put.
    assert loaded(address, home, out, HF_HUB_OFFLINE="1") == teacher


def test_a_tokenizer_is_fetched_without_weights(fetched: list[str]) -> None:
    assert len(load_tokenizer("someone/teacher")) == 1024
    assert "tokenizer.json" in fetched and not weights_in(fetched)


def test_weights_in_parts_and_weights_that_are_missing(published: Path, fetched: list[str]) -> None:
    model = published / "someone" / "teacher"
    shutil.move(model / "model.safetensors", model / "part-1.safetensors")
    weights = {"metadata": {}, "weight_map": {"any": "part-1.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(weights))
    teacher = find_teacher("someone/teacher")
    assert weights_in(fetched) == ["part-1.safetensors"]
    assert weight_files(teacher) == [teacher / "part-1.safetensors"]


@pytest.mark.parametrize("parts", [False, True])
def test_weights_that_are_missing_on_the_hub(published: Path, fetched: list[str], parts: bool) -> None:
    model = published / "someone" / "teacher"
    (model / "model.safetensors").unlink()
    if parts:
        (model / "model.safetensors.index.json").write_text('{"weight_map": {"any": "part-1.safetensors"}}')
    missing = r"a part of its weights: part-1\." if parts else r"\.safetensors weights: model\."
    with pytest.raises(UserError, match=f"lacks {missing}safetensors is missing"):
        find_teacher("someone/teacher")


def test_a_teacher_of_another_family_is_refused_before_its_weights_are_fetched(
    published: Path, fetched: list[str]
) -> None:
    config = published / "someone" / "teacher" / "config.json"
    config.write_text(config.read_text().replace('"qwen3"', '"mamba"'))
    with pytest.raises(UserError, match="mamba"):
        find_teacher("someone/teacher")
    assert "config.json" in fetched and not weights_in(fetched)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("someone/nothing", "neither a folder nor a model on the hub that can be reached: "),
        ("someone/gated", "neither a folder nor a model on the hub that can be reached: "),
        ("/no/such/folder", "it is no folder, and no name that a model on the hub has"),
    ],
)
def test_what_cannot_be_fetched(published: Path, fetched: list[str], name: str, reason: str) -> None:
    shutil.copytree(TEACHER, published / "someone" / "gated")
    with pytest.raises(UserError) as error:
        find_teacher(name)
    assert str(error.value).startswith(f"no teacher at '{name}': {reason}")
    assert "\n" not in str(error.value)


def weights_in(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors")]


def test_second_copies_of_the_weights_are_not_the_teacher(published: Path) -> None:
    model = published / "someone" / "teacher"
    before = _fingerprint(str(model), model)
    fetch_weights(str(model), fetch_small_files(str(model)))
    (model / "consolidated.safetensors").write_text("the same again")
    assert [file.name for file in weight_files(model)] == ["model.safetensors"]
    assert _fingerprint(str(model), model) == before
    (model / "model.safetensors").write_text("others")
    assert _fingerprint(str(model), model) != before


def test_a_fingerprint_is_of_all_that_a_hybrid_has_from_its_teacher(published: Path) -> None:
    """The middle of a file too, of its pieces, and what decides no token's id."""
    model = published / "someone" / "teacher"
    seen = {_fingerprint(str(model), model)}
    weights = bytearray(3 << 20)
    for at in (0, 3 << 19, (3 << 20) - 1):
        weights[at] = 1
        (model / "model.safetensors").write_bytes(weights)
        seen.add(_fingerprint(str(model), model))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(_fingerprint(str(model), model))
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    seen.add(_fingerprint(str(model), model))
    assert len(seen) == 6


def test_a_local_folder_without_all_its_weights(published: Path) -> None:
    model = published / "someone" / "teacher"
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks \.safetensors weights: model\.safetensors is missing"):
        fetch_weights(str(model), model)
    for content in ("[]", "{}", "{"):
        (model / "model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is not "):
            fetch_weights(str(model), model)
