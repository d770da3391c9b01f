from pathlib import Path

import numpy as np
import pytest

from halo.data.shards import write_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty samples of 16 random tokens: one epoch is no multiple of the batch."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    tokens = np.random.default_rng(0).integers(0, 64, (60, 16)).astype(np.uint16)
    write_shards(folder, tokens, {"tokenizer": "none"})
    return folder
