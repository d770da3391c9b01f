"""The sbatch scripts on a real Slurm: over nodes, interrupted in every way, and the whole graph."""

import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest

from halo.run import sha256
from tests.launcher.conftest import SMALL
from tests.slurm.cluster import NODES, ROOT, Cluster
from tests.slurm.conftest import Jobs, metrics

pytestmark = pytest.mark.timeout(480)  # with the jobs' waits in queues, and Python starting again and again

STEPS = 20
# fmt: off
TINY = [
    "--preset", "tiny", *SMALL, "--selection.layers", "[0, 6]",
    "--distill.steps", STEPS, "--distill.micro_batch", "2", "--distill.save_every", "3",
]
# fmt: on
WITHOUT_CORPUS = [
    word for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if "corpus" not in pair[0] for word in pair
]


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stage 2 ran over two nodes, uninterrupted."""
    folder = tmp_path_factory.mktemp("finished")
    jobs, run = Jobs(cluster, folder), folder / "run"
    job = jobs.submit("slurm/stage2_8b.sh", *TINY, "--run", run, "--prepare")
    jobs.wait_for(job, "COMPLETED", 280)
    assert f"2 x 1 ranks on 127.0.0.[2-3], each with a log in {run}/slurm/hypenet-9b-stage2-{job}" in jobs.said(job)
    return run


def test_a_stage_over_two_nodes(finished):
    (logs,) = (finished / "slurm").glob("hypenet-9b-stage2-*")
    assert f"-> {finished}/distill" in (logs / "rank-0.log").read_text()
    assert (logs / "rank-1.log").is_file()
    assert (finished / "distill" / "stage.json").is_file()


def test_a_finished_stage_is_not_run_again_and_a_mistake_not_repeated(jobs, finished):
    before = (finished / "distill" / "stage.json").stat().st_mtime_ns
    again = jobs.submit("slurm/stage2_8b.sh", *TINY, "--run", finished)
    wrong = jobs.submit("--nodes=1", "slurm/stage2_8b.sh", *TINY, "--run", finished.parent / "b", "--distill.lrr", "1")
    jobs.wait_for(again, "COMPLETED")
    assert (finished / "distill" / "stage.json").stat().st_mtime_ns == before
    jobs.wait_for(wrong, "FAILED")
    assert jobs.cluster.job(wrong)["Restarts"] == "0"
    assert "lrr is an unknown key (did you mean 'lr'?)" in jobs.said(wrong).splitlines()[-1]


def test_preempted_cancelled_and_after_a_node_failed_the_result_is_the_same(jobs, finished):
    """Bit for bit."""
    cluster, run = jobs.cluster, jobs.folder / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("distill", "slurm"))
    shutil.copytree(finished / "data", run / "data", dirs_exist_ok=True)
    command = ("slurm/stage2_8b.sh", *TINY, "--run", run)

    job = jobs.submit(*command)
    jobs.wait_for_steps(job, run, 2)
    shown = status(cluster, run)
    assert f"job {job} runs on 127.0.0.[2-3]" in shown
    assert f"distill is running; tail -f {run}/slurm/hypenet-9b-stage2-{job}/rank-0.log" in shown
    urgent = cluster.run("sbatch", "--parsable", "--output=/dev/null", "-p", "urgent", "-N3", "--wrap=true")
    cluster.wait(lambda: restarts(cluster, job) == 1, 60, "requeued job")
    jobs.wait_for(urgent, "COMPLETED")
    assert "stopped and saved: queued again" in jobs.said(job)

    stopped = saved(run)
    jobs.wait_for_steps(job, run, stopped + 2)
    cluster.run("scancel", job)
    jobs.wait_for(job, "CANCELLED")
    assert restarts(cluster, job) == 1
    assert stopped < saved(run) < STEPS
    assert f"interrupted  step {saved(run)} of {STEPS}, last checkpoint {saved(run)}" in status(cluster, run)

    job, cancelled = jobs.submit(*command), saved(run)
    jobs.wait_for_steps(job, run, cancelled + 2)
    assert cluster.job(job)["NodeList"] == "127.0.0.[2-3]"
    fail_node(cluster, NODES[1])
    jobs.wait_for(job, "COMPLETED", 280)
    assert restarts(cluster, job) == 1
    assert cluster.job(job)["NodeList"] == "127.0.0.[2,4]"

    assert [line["step"] for line in metrics(run)] == list(range(STEPS))
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(finished)]
    weights = Path("distill", "hybrid", "model.safetensors")
    assert sha256(run / weights) == sha256(finished / weights)
    cluster.start_node(NODES[1])


@pytest.mark.parametrize(
    ("check", "state", "said"),
    [
        ("[[ $SLURMD_NODENAME != 127.0.0.3 ]]", "COMPLETED", "failed: 127.0.0.3: queued again"),
        ("true", "FAILED", "0 of 2 nodes failed the check: see the logs"),
        ("false", "FAILED", "2 of 2 nodes failed the check: see the logs"),
    ],
)
def test_ranks_that_fail(jobs, check, state, said):
    """A node that fails its check is excluded; nothing else is tried again."""
    ranks = ranks_that(jobs, "exit 1")
    run = ("--preset", "tiny", "--run", jobs.folder / "run")
    job = jobs.submit("slurm/stage2_8b.sh", *run, HALO_PYTHON=ranks, HALO_CHECK=check)
    jobs.wait_for(job, state)
    assert said in jobs.said(job)
    if state == "COMPLETED":
        assert jobs.cluster.job(job)["NodeList"] == "127.0.0.[2,4]"


def test_ranks_are_signalled_before_the_time_is_over(jobs):
    ranks = ranks_that(jobs, "trap 'exit 75' TERM", "while true; do sleep 0.1; done")
    run = ("--preset", "tiny", "--run", jobs.folder / "run")
    job = jobs.submit("--time=15", "slurm/stage2_8b.sh", *run, HALO_PYTHON=ranks)
    jobs.wait_for(job, "COMPLETED")
    assert restarts(jobs.cluster, job) == 1
    assert "stopped and saved: queued again" in jobs.said(job)


def test_the_whole_graph(jobs):
    """From text: two tasks of an array prepare it, and the stages train on that."""
    run, shards = jobs.folder / "run", jobs.folder / "shards"
    preset = jobs.folder / "bare.toml"
    tiny = (ROOT / "halo" / "presets" / "tiny.toml").read_text().replace('"./', f'"{ROOT}/halo/presets/')
    preset.write_text("\n".join(line for line in tiny.splitlines() if not line.startswith(("corpus", "heldout"))))
    few = {"SBATCH_GPUS_PER_NODE": "1", "SBATCH_OUTPUT": f"{jobs.folder}/job-%j.out", "HALO_DATA_TASKS": "2"}
    few |= {"HALO_SHARDS": str(shards), "HALO_DATA": f"--source {ROOT}/halo/presets/tiny/corpus --whole --held_out 0.1"}
    command = ("bash", "slurm/table2.sh", "8b", "--preset", preset, "--run", run, *WITHOUT_CORPUS)
    printed = jobs.cluster.run(*command, **few)
    stages = dict(line.split(": job ") for line in printed.splitlines())
    assert list(stages) == ["data", "align", "selection", "distill", "finetune", "export", "niah", "csr"]
    for job in stages.values():
        jobs.wait_for(job, "COMPLETED", 240)
    assert "| hybrid |" in (run / "niah" / "niah.md").read_text()
    assert "| hybrid |" in (run / "csr" / "csr.md").read_text()
    again = jobs.cluster.run(*command, **few)
    del stages["data"]  # the run has recorded where its shards are
    assert [line.split(": ")[1] for line in again.splitlines()] == [f"done already, in {run}/{name}" for name in stages]


def ranks_that(jobs: Jobs, *lines: str) -> str:
    """A stand-in for Python that runs these lines, and succeeds if the job was queued again."""
    path = jobs.folder / "ranks"
    path.write_text("\n".join(["#!/bin/bash", "[[ -z ${SLURM_RESTART_COUNT:-} ]] || exit 0", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


def status(cluster: Cluster, run: Path) -> str:
    return cluster.run(sys.executable, "launcher/status.py", run)


def restarts(cluster: Cluster, job: str) -> int:
    return int(cluster.job(job)["Restarts"])


def saved(run: Path) -> int:
    """The step from which the run's next start resumes."""
    return int((run / "distill" / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))


def fail_node(cluster: Cluster, node: str) -> None:
    """Kill a node's daemon, and the ranks on it."""
    cluster.kill_node(node)
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURMD_NODENAME") == node and "launcher/kd.py" in process.cmdline():
                process.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue


def test_every_script_is_accepted_as_typed(jobs):
    """By Slurm, with the nodes, GPUs and time that it asks for."""
    scripts = [path for path in (ROOT / "slurm").glob("*.sh") if "#SBATCH" in path.read_text()]
    assert len(scripts) == 16
    for script in scripts:
        assert "to start at" in jobs.cluster.run("sbatch", "--test-only", script.relative_to(ROOT))
