"""One cluster for all tests of this folder, and helpers for its jobs."""

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import TOOLS, Cluster

MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]
STARTED = 90.0
"""Seconds that a job may take to its first step."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = f"Slurm is not installed (no {MISSING[0]}): apt-get install slurm-wlm munge" if MISSING else None
    if why is None and os.geteuid() != 0:
        why = "a cluster for tests needs root: its daemons start ranks"
    for item in items:
        if why and "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # munge refuses pytest's folders, which only their owner may enter
    folder.chmod(0o755)
    cluster = Cluster(folder)
    cluster.environment["HALO_PYTHON"] = sys.executable
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Jobs:
    """A test's way to submit the scripts, on one GPU a node that is not there: one rank a node."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder

    def submit(self, *words: object, **environment: str) -> str:
        """sbatch, and the job's id."""
        output = f"--output={self.folder}/job-%j.out"
        return self.cluster.run("sbatch", "--parsable", output, "--gpus-per-node=1", *words, **environment)

    def said(self, job: str) -> str:
        path = self.folder / f"job-{job}.out"
        return path.read_text() if path.is_file() else ""

    def ranks_said(self, job: str) -> str:
        """The ends of its ranks' logs."""
        folders = re.findall(r"each with a log in (\S+)", self.said(job))
        logs = [path for folder in dict.fromkeys(folders) for path in sorted(Path(folder).glob("*.log"))]
        return "".join(f"\n{path}:\n{path.read_text()[-2000:]}" for path in logs)

    def wait_for_steps(self, job: str, run: Path, steps: int) -> None:
        """Until stage 2 has done that many."""
        self.cluster.wait(lambda: len(metrics(run)) >= steps or self.ended(job), STARTED, f"{steps} steps")
        assert not self.ended(job), self.said(job)

    def wait_for(self, job: str, state: str, seconds: float = 180) -> None:
        self.cluster.wait(lambda: self.ended(job), seconds, f"end of job {job}: {self.said(job)}")
        assert self.cluster.state(job) == state, self.said(job) + self.ranks_said(job)

    def ended(self, job: str) -> bool:
        """Seen twice: a job that queues itself again is at an end for a moment."""
        unfinished = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        if self.cluster.state(job) in unfinished:
            return False
        time.sleep(1)
        return self.cluster.state(job) not in unfinished


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Jobs:
    return Jobs(cluster, tmp_path)


def metrics(run: Path) -> list[dict[str, float]]:
    """Stage 2's."""
    path = run / "distill" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
