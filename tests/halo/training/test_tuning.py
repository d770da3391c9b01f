"""fla's kernels are tuned once on a machine: Triton's own tuner and cache, in processes. Only the GPU is made up."""

import importlib
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.tune import write
from halo.errors import UserError
from halo.training import tuning
from halo.training.tuning import cache_variables, own_folder
from tests.distributed.ranks import CONTEXT
from tests.halo.training.tuning_rank import look

VARIABLES = ("TRITON_CACHE_DIR", "TRITON_HOME", "FLA_CONFIG_DIR", "FLA_CACHE_MODE")
GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, and no variable that a user set."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_folder_is_the_users_alone(temporary):
    folder = own_folder()
    assert folder.parent == temporary
    assert folder.stat().st_mode & 0o777 == 0o700
    assert own_folder() == folder


def test_a_folder_that_others_could_fill_is_refused(temporary):
    folder = own_folder()
    folder.chmod(0o777)
    with pytest.raises(UserError, match="that you alone can write to"):
        own_folder()
    folder.rmdir()
    (temporary / "elsewhere").mkdir()
    folder.symlink_to(temporary / "elsewhere")
    with pytest.raises(UserError, match="that you alone can write to"):
        own_folder()
    folder.unlink()
    folder.write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        own_folder()


def test_variables_that_are_set_stay(temporary, monkeypatch):
    assert cache_variables(temporary, GPU) == {"TRITON_CACHE_DIR": str(temporary / "triton")}
    measured = temporary / "tuned" / "NVIDIA_H100_80GB_HBM3"
    measured.mkdir(parents=True)
    monkeypatch.setattr(tuning, "MEASURED", measured.parent)
    found = {"FLA_CONFIG_DIR": str(measured), "FLA_CACHE_MODE": "strict"}
    assert cache_variables(temporary, GPU) == {"TRITON_CACHE_DIR": str(temporary / "triton")} | found
    assert cache_variables(temporary, "another") == {"TRITON_CACHE_DIR": str(temporary / "triton")}
    monkeypatch.setenv("TRITON_HOME", "mine")
    assert cache_variables(temporary, GPU) == found
    monkeypatch.setenv("FLA_CACHE_MODE", "disabled")
    assert cache_variables(temporary, GPU) == {}


def test_a_gpus_folder_is_named_as_fla_names_it():
    fla = pytest.importorskip("fla.ops.utils.cache")
    for name in (GPU, "NVIDIA A100-SXM4-80GB", " (a) "):
        assert tuning.gpu_folder(name) == fla.sanitize_gpu_name(name)


def start(*arguments: object):
    process = CONTEXT.Process(target=look, args=arguments, daemon=True)
    process.start()
    return process


def exits(*processes) -> list[int | None]:
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes]


def test_one_process_tunes_and_the_others_read(tmp_path):
    log = tmp_path / "log"
    assert exits(*(start(tmp_path, ["first", "second"], log) for _ in range(3))) == [0, 0, 0]
    assert sorted(log.read_text().split()) == ["first", "second"]
    assert exits(start(tmp_path, ["first", "second", "third"], log)) == [0]
    assert sorted(log.read_text().split()) == ["first", "second", "third"]


def test_who_tunes_may_wait_for_one_who_looks_for_another_kernel(tmp_path):
    """As in a collective that comes after the other kernel."""
    log, done = tmp_path / "log", tmp_path / "done"
    ahead = start(tmp_path, ["second"], log, done)
    while not log.exists() and ahead.is_alive():
        time.sleep(0.01)
    behind = start(tmp_path, ["first"], log)
    assert exits(behind) == [0]
    done.touch()
    assert exits(ahead) == [0]


def test_fla_reads_what_the_benchmark_writes(tmp_path, monkeypatch):
    cache = pytest.importorskip("fla.ops.utils.cache")
    kernel = importlib.import_module("fla.ops.common.chunk_delta_h").chunk_gated_delta_rule_fwd_kernel_h_blockdim64.fn
    monkeypatch.setattr(cache, "FLA_CACHE_MODE", cache.FlaCacheMode.STRICT)
    monkeypatch.setenv("FLA_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(kernel, "cache", {})
    best, other = kernel.configs[-1], kernel.configs[0]
    known = (16, 16, 128, 128, 64, False, "torch.bfloat16")
    for shape, config in (((9, *known[1:]), other), (known, best)):
        write({kernel.kernel_name: {shape: config}}, tmp_path)
    keys = [cache.AutotuneKey(shape) for shape in (known, (9, *known[1:]), (8, *known[1:]))]
    for key in keys:
        kernel.maybe_load_cached_config(key, nargs={}, runtime_kwargs={})
    assert {shape: vars(config) for shape, config in kernel.cache.items()} == {
        known: vars(best),
        (9, *known[1:]): vars(other),
    }


def test_one_line_tells_what_was_tuned(temporary, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    tuning._seconds.extend([40.0, 2.4])
    tuning.report_tuning()
    tuning.report_tuning()
    assert capsys.readouterr().out == "fla's kernels were tuned, once on each machine: 42 s; kept in kept\n"
