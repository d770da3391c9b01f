"""All samples of a small folder of shards."""

from pathlib import Path

import numpy as np
import torch

from halo.data.reader import ShardReader


def read_samples(folder: str | Path) -> torch.Tensor:
    """Int64 [N, T], in the order in which they were written."""
    reader = ShardReader(folder)
    return torch.from_numpy(np.stack([reader.read(i) for i in range(len(reader))]).astype(np.int64))
