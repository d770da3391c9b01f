"""What tests of several packages share."""

import subprocess
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

ORDER = ["slurm", "hypenet", "halo", "launcher", "distributed"]
"""Of the folders in `pytest -n 2`. Slurm's tests wait a lot: they begin, beside those that need one process each."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if " at 0x" in item.nodeid:  # processes of pytest-xdist would disagree, and run none
            raise pytest.UsageError(f"{item.nodeid[:200]} has an address in its name: give its parameters ids")
    if hasattr(config, "workerinput"):  # under pytest-xdist
        items.sort(key=lambda item: (*ORDER, item.path.parent.name).index(item.path.parent.name))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What runs in one process, in turn: a module, or all that share more than that."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid.partition("::")[0])

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def group(module: str) -> str:
    """Those of Slurm share a cluster; those of launchers one demo's run, and the one port of DeepSpeed's launcher."""
    if module.startswith("tests/launcher") or module == "tests/distributed/test_stopping.py":
        return "launcher"
    return "slurm" if module.startswith("tests/slurm") else module


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """A list for commands that must not outlive the test."""
    commands: list[subprocess.Popen[str]] = []
    yield commands
    for command in commands:
        if command.poll() is None:
            for process in [*psutil.Process(command.pid).children(recursive=True), command]:
                process.kill()
        command.wait()
