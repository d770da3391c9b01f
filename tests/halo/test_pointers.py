"""A Git-LFS pointer is named as one, wherever a file is looked for."""

import shutil
from pathlib import Path

import pytest

from halo.data.corpus import cut, read_documents
from halo.errors import UserError
from halo.models.loading import find_teacher
from halo.pointers import check_no_pointer
from tests.launcher.conftest import TEACHER

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234567\n"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pointer_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / "0.txt").write_text("Text.")
    (tmp_path / name).write_text(POINTER)
    line = f"{tmp_path / name} is a Git-LFS pointer, not the file itself: fetch it with git lfs pull"
    with pytest.raises(UserError) as refused:
        list(read_documents(tmp_path, "train"))
    assert str(refused.value) == line
    with pytest.raises(UserError, match="is a Git-LFS pointer"):
        cut(tmp_path, 1 << 20)


def test_text_about_pointers_is_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for text in (f"It reads:\n{POINTER}", POINTER + "and so on. " * 100, ""):
        file.write_text(text)
        check_no_pointer(file)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_teacher_of_pointers_is_refused(tmp_path: Path, name: str) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(TEACHER, teacher)
    (teacher / "picture.png").write_text(POINTER)  # belongs to no teacher
    assert find_teacher(str(teacher)) == teacher
    (teacher / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is a Git-LFS pointer"):
        find_teacher(str(teacher))
