"""An interrupted run resumes as if it had not been interrupted: exactly, on any number of ranks, from whole files."""

import hashlib
import json
import os
import pickle
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from halo.errors import UserError
from halo.run import sha256
from halo.training.background import write_tensors
from halo.training.checkpoint import ENGINE
from halo.training.engine import CHECKPOINT_TYPES, Engine
from halo.training.pickles import without_code
from tests.distributed import fault_jobs, jobs
from tests.distributed.ranks import run_ranks

SETTINGS = jobs.training(save_every=2)


def interrupt(step: int, ranks: int, job, shards: Path, folder: Path, zero: str = "zero3.json", settings=SETTINGS):
    with pytest.raises(RuntimeError, match="stopped"):
        run_ranks(ranks, fault_jobs.interrupted, step, job, shards, folder, zero, settings)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]):
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(two[name], weight), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of six steps of stage 2 on two ranks under ZeRO-3, without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    weights = run_ranks(2, jobs.distill, shards, folder, "zero3.json", SETTINGS)[0].weights
    return jobs.losses(folder), weights


@pytest.fixture(scope="module")
def stopped_at_5(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The same run, interrupted as step 5 began: it has the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped")
    interrupt(5, 2, jobs.distill, shards, folder)
    return folder


@pytest.fixture
def stopped(stopped_at_5: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(stopped_at_5, tmp_path / "stage")


def test_an_interrupted_run_resumes_exactly(stopped, shards, whole):
    assert checkpoints(stopped) == ["latest", "step-000000002", "step-000000004"]
    weights = run_ranks(2, jobs.distill, shards, stopped, "zero3.json", SETTINGS)[0].weights
    assert jobs.losses(stopped) == whole[0]
    assert_equal(whole[1], weights)


def test_training_continues_while_a_checkpoint_is_written(tmp_path, shards, whole):
    """The checkpoint of step 2 is written until step 4 is saved; that one is not whole when the process ends."""
    with pytest.raises(RuntimeError, match="stopped"):
        run_ranks(2, fault_jobs.interrupted_amid_writing, 5, jobs.distill, shards, tmp_path, "zero3.json", SETTINGS)
    assert len(jobs.losses(tmp_path)) >= 4  # rank 0 may be ended before it has recorded the last
    assert checkpoints(tmp_path) == ["latest", "step-000000002", "step-000000004.partial"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000000002\n"
    weights = run_ranks(2, fault_jobs.written_late, jobs.distill, shards, tmp_path, "zero3.json", SETTINGS)[0].weights
    assert jobs.losses(tmp_path) == whole[0]
    assert_equal(whole[1], weights)
    assert checkpoints(tmp_path) == ["latest", "step-000000004", "step-000000006"]


@pytest.mark.parametrize(
    ("zero", "fused"), [("zero1.json", False), ("zero2.json", False), ("zero3.json", False), ("zero1.json", True)]
)
def test_a_run_resumes_on_another_number_of_ranks(tmp_path, shards, whole, zero, fused):
    """2 -> 1 -> 2. ZeRO-3 steps the weights in several parts, as those of large models.

    Where a GPU's kernel steps the first and the last part, DeepSpeed steps the second.
    """
    distill = partial(jobs.with_fused_step, jobs.distill) if fused else jobs.distill
    config = json.loads((jobs.DS_CONFIGS / zero).read_text())
    config["zero_optimization"]["sub_group_size"] = 3000
    zero = str(tmp_path / zero)
    Path(zero).write_text(json.dumps(config))
    folder = tmp_path / "stage"
    interrupt(3, 2, distill, shards, folder, zero)
    interrupt(5, 1, jobs.distill, shards, folder, zero)
    weights = run_ranks(2, distill, shards, folder, zero, SETTINGS)[0].weights
    assert jobs.losses(folder) == pytest.approx(whole[0], abs=1e-4)
    for name, weight in whole[1].items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert checkpoints(folder) == ["latest", "step-000000004", "step-000000006"]


@pytest.mark.parametrize("zero", ["zero1.json", "zero3.json"])
def test_stage_1_resumes_on_another_number_of_ranks(tmp_path, shards, zero):
    """Its optimizer has a parameter group for each layer."""
    weights = run_ranks(2, jobs.align, shards, tmp_path / "whole", zero, SETTINGS)[0].weights
    interrupt(3, 2, jobs.align, shards, tmp_path / "parts", zero)
    found = run_ranks(1, jobs.align, shards, tmp_path / "parts", zero, SETTINGS)[0].weights
    assert jobs.losses(tmp_path / "parts") == pytest.approx(jobs.losses(tmp_path / "whole"), abs=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=5e-5, msg=name)


def test_each_rank_keeps_its_random_state(tmp_path, shards):
    """ZeRO-1 writes rank 0's client state alone."""
    run_ranks(2, jobs.noisy, shards, tmp_path / "whole", "zero1.json", SETTINGS)
    interrupt(3, 2, jobs.noisy, shards, tmp_path / "parts", "zero1.json")
    run_ranks(2, jobs.noisy, shards, tmp_path / "parts", "zero1.json", SETTINGS)
    assert jobs.losses(tmp_path / "parts") == jobs.losses(tmp_path / "whole")


@pytest.mark.parametrize("zero", ["zero1.json", "zero3.json"])
def test_what_is_frozen_is_not_saved(tmp_path, shards, zero):
    whole = run_ranks(2, jobs.partly_frozen, shards, tmp_path / "whole", zero, SETTINGS)[0].weights
    parts = tmp_path / "parts"
    interrupt(3, 2, jobs.partly_frozen, shards, parts, zero)
    assert sum(path.stat().st_size for path in (parts / "checkpoints" / "step-000000002").rglob("*")) < 1e6
    assert_equal(whole, run_ranks(2, jobs.partly_frozen, shards, parts, zero, SETTINGS)[0].weights)


@pytest.mark.parametrize(("number", "save_every"), [(signal.SIGTERM, 100), (signal.SIGUSR1, 3)])
def test_a_signal_to_one_rank_stops_all_after_the_step_and_saves(tmp_path, shards, whole, number, save_every):
    """Also while another checkpoint is being written."""
    settings = jobs.training(save_every=save_every)
    job = (fault_jobs.asked_to_stop, 3, number, jobs.distill, shards, tmp_path, "zero3.json", settings)
    told = run_ranks(2, fault_jobs.written_late, *job)
    assert told == [f"{tmp_path.name}: stopped after 4 of 6 steps, and saved"] * 2
    assert checkpoints(tmp_path) == ["latest", *["step-000000003"][: save_every < 4], "step-000000004"]
    weights = run_ranks(2, jobs.distill, shards, tmp_path, "zero3.json", settings)[0].weights
    assert jobs.losses(tmp_path) == whole[0]
    assert_equal(whole[1], weights)


def test_which_checkpoints_are_kept(tmp_path, shards):
    settings = jobs.training(steps=10, save_every=2, keep_last=1, keep_every=4)
    run_ranks(1, jobs.finetune, shards, tmp_path, "zero1.json", settings)
    assert checkpoints(tmp_path) == ["latest", "step-000000004", "step-000000008", "step-000000010"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000000010\n"


def test_a_checkpoint_lists_every_file(stopped):
    for checkpoint in stopped.glob("checkpoints/step-*"):
        files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
        listed = json.loads(files.pop("manifest.json").read_text())
        assert {name: entry["sha256"] for name, entry in listed.items()} == {n: sha256(p) for n, p in files.items()}
        assert {"state.json", "random-00000.pt", "random-00001.pt"} < listed.keys()
        assert len([name for name in listed if name.startswith(f"{ENGINE}/")]) == 4


def refusal(folder: Path, shards: Path, zero: str = "zero3.json", **changes) -> str:
    with pytest.raises(UserError) as error:
        run_ranks(2, jobs.distill, shards, folder, zero, jobs.training(save_every=2, **changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_is_resumed_only_with_its_own_settings(stopped, shards):
    latest, before = stopped / "checkpoints" / "step-000000004", checkpoints(stopped)
    assert refusal(stopped, shards, lr=0.5) == (
        f"{latest} was made with another lr (0.001, now 0.5): resume with the same, "
        f"or remove {latest.parent} to start the stage again"
    )
    assert f"{latest} was made with another ZeRO stage (3, now 1)" in refusal(stopped, shards, "zero1.json")
    assert checkpoints(stopped) == before


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(stopped, shards, whole):
    latest, earlier = stopped / "checkpoints" / "step-000000004", stopped / "checkpoints" / "step-000000002"
    before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
    onward = ": remove it to resume from step-000000002"
    shard = next(latest.rglob("*rank_1*optim_states.pt"))
    intact = shard.read_bytes()
    name = shard.relative_to(latest)
    for broken in (intact[:-100], intact[:500] + bytes([intact[500] ^ 1]) + intact[501:]):
        shard.write_bytes(broken)
        assert refusal(stopped, shards) == f"{latest} is damaged ({name} is not what was written)" + onward
    shard.unlink()
    assert refusal(stopped, shards) == f"{latest} is damaged ({name}: No such file or directory)" + onward
    shard.write_bytes(intact)
    state = (latest / "state.json").read_text()
    (latest / "state.json").write_text(state.replace('"step": 4', '"step": 5'))
    assert refusal(stopped, shards) == f"{latest} is damaged (state.json is not what was written)" + onward
    for text in ("{", "[]", "{}"):
        (latest / "manifest.json").write_text(text)
        said = refusal(stopped, shards)
        assert said.startswith(f"{latest / 'manifest.json'} is not valid") or "does not name state.json" in said
        assert said.endswith(" to resume from step-000000002")
    assert before == {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}

    shutil.rmtree(latest)
    weights = run_ranks(2, jobs.distill, shards, stopped, "zero3.json", SETTINGS)[0].weights
    assert jobs.losses(stopped) == whole[0]
    assert_equal(whole[1], weights)


class Command:
    """Pickled: a call that makes a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["random-00001.pt", "engine/zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_checkpoint_that_would_run_code_is_refused(stopped, shards, tmp_path, name):
    """Also where its list of files is made to fit."""
    checkpoint, ran = stopped / "checkpoints" / "step-000000004", tmp_path / "ran"
    entry = write_tensors(torch.load(checkpoint / name, weights_only=False) | {"more": Command(ran)}, checkpoint / name)
    listed = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(listed | {name: entry}))
    assert refusal(stopped, shards) == (
        f"{checkpoint / name} is not loaded, because it names posix.mkdir, which could run code: no checkpoint of HALO "
        f"does; remove {checkpoint.parent} to start the stage again"
    )
    if name.startswith(ENGINE):  # what DeepSpeed loads itself
        with pytest.raises(OSError):
            Engine.convert(checkpoint / ENGINE, tmp_path / "converted" / ENGINE)
        with pytest.raises(pickle.UnpicklingError), without_code(CHECKPOINT_TYPES):
            torch.load(checkpoint / name, weights_only=False)
    entry = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    (checkpoint / name).write_bytes(b"")
    (checkpoint / "manifest.json").write_text(json.dumps(listed | {name: entry}))
    assert f"is damaged ({name} was not written by torch.save)" in refusal(stopped, shards)
    assert not ran.exists()


def test_a_lone_damaged_checkpoint(stopped, shards):
    shutil.rmtree(stopped / "checkpoints" / "step-000000002")
    latest = stopped / "checkpoints" / "step-000000004"
    (latest / "random-00001.pt").write_bytes(b"")
    assert refusal(stopped, shards).endswith("is not what was written): remove it to start the stage again")


def test_what_a_killed_run_leaves_behind_is_no_checkpoint(stopped, shards, whole):
    """Half of a checkpoint, half of a conversion, and a checkpoint that `latest` does not name yet."""
    folder = stopped / "checkpoints"
    (folder / "step-000000006.partial").mkdir()
    (folder / "step-000000004.converted").mkdir()
    (folder / "latest").write_text("step-000000002\n")
    weights = run_ranks(2, jobs.distill, shards, stopped, "zero3.json", SETTINGS)[0].weights
    assert jobs.losses(stopped) == whole[0]
    assert_equal(whole[1], weights)
    assert checkpoints(stopped) == ["latest", "step-000000004", "step-000000006"]


@pytest.mark.parametrize(
    ("full_from", "lost", "kept"), [(3, 4, 2), (5, 6, 4)], ids=["while training continues", "at the end"]
)
def test_a_full_disk_ends_all_ranks_and_spoils_nothing(tmp_path, shards, whole, full_from, lost, kept):
    told = run_ranks(2, fault_jobs.on_a_full_disk, full_from, jobs.distill, shards, tmp_path, "zero3.json", SETTINGS)
    folder = tmp_path / "checkpoints"
    assert (
        told
        == [
            f"the checkpoint of step {lost} cannot be written to {folder} (File too large): "
            f"mend that, and the same command resumes from step-{kept:09d}"
        ]
        * 2
    )
    assert len(jobs.losses(tmp_path)) == min(lost + 1, 6)
    assert checkpoints(tmp_path) == ["latest", *(f"step-{step:09d}" for step in range(2, lost, 2))]
    weights = run_ranks(2, jobs.distill, shards, tmp_path, "zero3.json", SETTINGS)[0].weights
    assert jobs.losses(tmp_path) == whole[0]
    assert_equal(whole[1], weights)
