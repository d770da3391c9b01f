"""What the system refuses is one line, whoever writes, and nothing half-written stays."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from halo.data.shards import write_shards
from halo.distributed import on_every_rank, on_rank0
from halo.errors import EXIT_USER_ERROR, UserError, exit_on_user_error
from halo.preset import load_config
from halo.run import StageFolder, atomic_folder, recorded_config
from tests.hypenet.sizes import SIZES


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Stood in for by the largest file that this process may write, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def shards(folder: Path) -> None:
    write_shards(folder, (np.arange(100, dtype=np.uint16) for _ in range(100)), {})


def tensors(folder: Path) -> None:
    StageFolder(folder.parent, {}).save_tensors(folder.name, {"weight": torch.ones(10_000)})


def figures(folder: Path) -> None:
    StageFolder(folder.parent, {}).save_json(folder.name, list(range(10_000)))


def model(folder: Path) -> None:
    with atomic_folder(folder) as partial:
        Qwen3ForCausalLM(Qwen3Config(**SIZES)).save_pretrained(partial)


@pytest.mark.parametrize("write", [shards, tensors, figures, model])
@pytest.mark.parametrize("ranks", [on_rank0, on_every_rank])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, write: Callable[[Path], None], ranks: Callable):
    path = tmp_path / "stage" / "result"
    with pytest.raises(UserError) as error, full_disk(5000):
        ranks(write, path)
    assert str(error.value) == f"{path}: File too large; mend that, and type the same command again"
    assert not list(path.parent.iterdir())


def test_a_command_ends_with_that_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end, exit_on_user_error():
        shards(tmp_path / "file" / "shards")
    assert end.value.code == EXIT_USER_ERROR
    said = (
        f"error: {tmp_path / 'file' / 'shards'}.partial: Not a directory; mend that, and type the same command again\n"
    )
    assert capsys.readouterr().err == said
    with pytest.raises(FileNotFoundError), exit_on_user_error():
        raise FileNotFoundError("a library's own, which the system has not refused")


def test_what_is_configured_already_is_not_written_again(tmp_path: Path):
    config = load_config("tiny")
    with recorded_config(tmp_path, config):
        written = (tmp_path / "config.toml").stat()
    with recorded_config(tmp_path, config):
        assert (tmp_path / "config.toml").stat() == written
    changed = load_config("tiny", ["--align.lr", "0.5"])
    with (
        pytest.raises(UserError, match=r"config.toml: File too large"),
        full_disk(300),
        recorded_config(tmp_path, changed),
    ):
        pass
    assert (tmp_path / "config.toml").stat() == written
