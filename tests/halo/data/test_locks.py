"""One process works on a run's folder, and it is free again however that process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from halo.data import locks
from halo.data.locks import NoLocksError, RunLock
from halo.errors import UserError

HOLD = (
    "import sys, time; from pathlib import Path; from halo.data.locks import RunLock\n"
    "lock = RunLock(Path(sys.argv[1])); lock.take(); print('held', flush=True); time.sleep(60)"
)


def test_a_run_has_one_worker(tmp_path: Path):
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        lock, who = RunLock(run), f"process {other.pid} on {os.uname().nodename}"
        with pytest.raises(UserError) as error:
            lock.take()
        assert str(error.value) == f"another process works on {run} ({who}): wait until it ends, or stop it"
        lock.release()  # which is not held
        assert [path.name for path in run.iterdir()] == [".lock"]
        other.kill()
        other.wait()
    lock.take()
    lock.release()
    assert not list(run.iterdir())


def test_a_lock_that_was_released_while_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its file is gone: it locks nothing, and another is made."""
    plain, calls = locks.try_lock, []

    def late(*args: object) -> bool:
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(args)
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(locks, "try_lock", late)
    lock = RunLock(tmp_path)
    lock.take()
    assert len(calls) == 2
    assert (tmp_path / ".lock").is_file()
    lock.release()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def none(*args: object) -> bool:
        raise NoLocksError("no file locks here")

    monkeypatch.setattr(locks, "try_lock", none)
    lock = RunLock(tmp_path)
    lock.take()
    assert capsys.readouterr().out == f"no file locks here; until then, start no second command on {tmp_path}\n"
    lock.release()
