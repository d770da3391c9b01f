"""Threads beside training: none is at work when the interpreter ends, which would end the process with SIGABRT."""

import subprocess
import sys
import threading

import numpy as np
import torch

from halo.data.reader import ShardReader
from halo.data.shards import write_shards
from halo.training.background import Writing
from tests.launcher.conftest import ROOT


def test_no_thread_outlives_what_it_serves(tmp_path):
    """However often, and whatever it is at when it is to end."""
    before = threading.active_count()
    write_shards(tmp_path / "shards", [np.zeros(4096, np.uint16)] * 500, {"tokenizer": "x"})
    content = [torch.ones(50_000) for _ in range(10)]
    for i in range(50):
        reader = ShardReader(tmp_path / "shards")
        reader.prepare([0])
        writing = Writing(tmp_path, {tmp_path / f"{i}-{j}.pt": content for j in range(20)})
        writing.abandon()
        del reader
        assert writing.is_over()
        assert threading.active_count() == before


def test_an_interpreter_that_ends_while_a_shard_is_opened(tmp_path):
    write_shards(tmp_path / "shards", [np.zeros(4096, np.uint16)] * 500, {"tokenizer": "x"})
    code = f"from halo.data.reader import ShardReader\nreader = ShardReader({str(tmp_path / 'shards')!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}reader.prepare([0])"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
