"""`plan` as one types it."""

import runpy
import sys

import pytest

from tests.launcher.conftest import ROOT, python

Typed = tuple[int, str, str]
"""Exit status, and what was printed on the two streams."""


@pytest.fixture
def typed(monkeypatch, capsys):
    """Run the launcher in this process: an import of transformers takes longer than all that it does."""

    def run(*arguments: str) -> Typed:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("launcher/plan.py", run_name="__main__")
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def test_every_stage_of_a_preset():
    done = python("launcher/plan.py", "--preset", "hypenet-9b", "--gpu", "h200", "--ds_config", "ds_configs/zero3.json")
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        *("From the published shapes of Qwen/Qwen3-8B", "On 1 node of 8 NVIDIA H200", "ZeRO-3"),
        *("align: 20,000 steps", "distill: 20,000 steps", "finetune: 500 steps", "distill fits: "),
        *("parameters", "gradients", "optimizer", "activations", "allocated", "GPU hours", "a checkpoint", "Assumed:"),
    ):
        assert words in done.stdout


def test_a_stage_that_does_not_fit_or_cannot_run_ends_with_status_1(typed):
    status, out, _ = typed("--preset", "hypenet-9b", "--gpu", "l40s", "--nodes", "6", "--distill.micro_batch", "2")
    assert status == 1
    assert "distill does not fit: " in out
    assert "a GPU computes 2 sequences once a step" in out
    assert "align cannot run: 48 ranks are more than the 32 samples of a batch" in out


def test_one_stage_of_a_local_teacher(typed):
    status, out, _ = typed("--stage", "distill", "--gpu", "rtx4090", "--gpus_per_node", "1", "--network", "10")
    assert status == 0
    assert "tiny/teacher: a teacher of 0.00B parameters" in out
    assert "align" not in out
    assert "from other nodes 1 GB/s a GPU" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset", "hypenet-9"], "no preset 'hypenet-9' (did you mean 'hypenet-9b'?); presets: "),
        (["--gpu", "h2000"], "no GPU 'h2000' (did you mean 'h200'?); known: a100-40gb, a100, "),
        (
            ["--stage", "distil"],
            "plan knows the stages that train, pretrain, align, distill, finetune, not 'distil' (did",
        ),
        (["--nodes", "0"], "--nodes: must be at least 1, not 0"),
        (["--stage", "distill", "--nodes", "3"], "24 ranks are more than the 16 samples of a batch"),
        (["--distill.stesp", "3"], "--distill.stesp is an unknown key (did you mean 'steps'?)"),
        (["--ds_config", "none.json"], "no DeepSpeed config at none.json"),
    ],
)
def test_a_mistake_is_one_line(typed, arguments, line):
    status, out, err = typed("--gpu", "h200", *arguments)
    assert (status, out) == (2, "")
    (error,) = err.splitlines()
    assert error.startswith("error: ")
    assert line in error
