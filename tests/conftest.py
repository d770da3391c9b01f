"""What tests of several packages share."""

import subprocess
from collections.abc import Iterator

import psutil
import pytest


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
