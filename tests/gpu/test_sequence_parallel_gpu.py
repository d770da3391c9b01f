"""Sequence parallelism with kernels: two ranks on one GPU, which exchange through gloo, against one process."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import Qwen3Config
from triton.runtime.autotuner import Autotuner

from halo.models.attention import IMPLEMENTATIONS, refusal, shape_of
from halo.models.attention_functions import use_attention
from halo.parallel.sequence import SequenceGroup
from halo.teacher.batch import Batch
from halo.training.objectives import NextToken
from hypenet import HypeNetConfig, HypeNetForCausalLM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

B, T, SEPARATOR = 2, 512, 255
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "initializer_range": 0.06,
}
RUNNING = [name for name in IMPLEMENTATIONS if not refusal(name, shape_of(Qwen3Config(head_dim=128), T, trains=True))]
CASES = [("lightning-attn", False, "sdpa"), ("gla", True, "sdpa"), ("deltanet", True, "sdpa")]
CASES += [("lightning-attn", True, name) for name in RUNNING]
"""The mixer, whether documents are packed, and what computes softmax attention."""

_prune = Autotuner.prune_configs
Autotuner.prune_configs = lambda tuner, arguments: _prune(tuner, arguments)[:1]
"""Of a kernel's configurations the first is taken, untimed: each would have to be compiled, for minutes."""


def gradients(
    mixer: str, packed: bool, attention: str, degree: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Of every parameter, and the loss, of a model of two layers."""
    torch.manual_seed(0)
    types = [mixer, "attn"]
    config = HypeNetConfig(**SHAPE, num_hidden_layers=2, mixer_types=types)
    model = use_attention(HypeNetForCausalLM(config).to("cuda", dtype).train(), attention)
    ids = torch.randint(0, SEPARATOR, (B, T))
    ids[:, [100, 255, 400]] = SEPARATOR
    objective = NextToken(model, separator=SEPARATOR if packed else None, sequence=SequenceGroup(degree))
    batch = Batch.on_host(ids, objective.separator).to(torch.device("cuda"))
    loss, _ = objective(batch)
    loss.backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    found = {name: x.float().cpu() for name, x in found.items()}
    if degree > 1:
        for x in found.values():
            dist.all_reduce(x)
            x /= degree
    return found


def through_host(collective):
    """Gloo's own for CUDA tensors is not in every build."""

    def run(output, given, group=None):
        parts = output if isinstance(output, list) else [output]
        on_host = [part.cpu() for part in parts]
        collective(on_host if isinstance(output, list) else on_host[0], given.cpu(), group=group)
        for part, received in zip(parts, on_host, strict=True):
            part.copy_(received)

    return run


def _rank(rank: int, store: str, results: str) -> None:
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.all_to_all_single, dist.all_gather = through_host(dist.all_to_all_single), through_host(dist.all_gather)
    found = [gradients(*case, degree=2) for case in CASES]
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


def test_two_ranks_compute_what_one_does():
    """As near as one process in half precision is to single precision, within a factor."""
    one = [gradients(*case, degree=1) for case in CASES]  # first: what it compiles, both ranks find in Triton's cache
    exact = [gradients(*case[:2], "sdpa", degree=1, dtype=torch.float32) for case in CASES]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (f"{folder}/store", f"{folder}/results"), nprocs=2)
        both = torch.load(f"{folder}/results")
    for case, alone, found, true in zip(CASES, one, both, exact, strict=True):
        for name, x in true.items():
            rounding, off = (float((y[name] - x).norm() / x.norm()) for y in (alone, found))
            assert off <= 2 * rounding + 2e-3, (case, name, off, rounding)
