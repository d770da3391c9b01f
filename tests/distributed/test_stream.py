"""Real ranks draw the same global batches as one, over epochs and across a resume."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from halo.data.shards import write_shards
from halo.data.stream import TokenStream
from halo.distributed import rank, world_size
from tests.distributed.ranks import run_ranks

SAMPLES, BATCH, STEPS = 53, 8, 14  # two epochs and a bit


def _global_batches(folder: Path, state: dict[str, Any] | None, steps: int) -> tuple[list[list[int]], dict[str, Any]]:
    stream = TokenStream(folder, micro_batch=BATCH // world_size(), seed=0, rank=rank(), world_size=world_size())
    if state is not None:
        stream.load_state_dict(state)
    batches = []
    for _ in range(steps):
        mine = next(stream)[:, 0].contiguous()
        parts = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(parts, mine)
        batches.append(torch.cat(parts).tolist())
    return batches, stream.state_dict()


def test_two_and_four_ranks_draw_the_batches_of_one(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(folder, np.repeat(np.arange(SAMPLES, dtype=np.uint16)[:, None], 4, axis=1), {})
    [(one, _)] = run_ranks(1, _global_batches, folder, None, STEPS)
    begun = run_ranks(2, _global_batches, folder, None, 5)
    resumed = run_ranks(4, _global_batches, folder, begun[0][1], STEPS - 5)
    assert begun[0] == begun[1]
    assert begun[0][0] + resumed[3][0] == one
    assert sorted(list(chain.from_iterable(one))[:SAMPLES]) == list(range(SAMPLES))
