"""Sequence parallelism with kernels: two ranks on one GPU, which exchange through gloo, against one process."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from halo.objectives import NextToken
from halo.sequence_parallel import SequenceGroup
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
CASES = [("lightning-attn", False), ("lightning-attn", True), ("gla", True), ("deltanet", True)]


def gradients(mixer: str, packed: bool, degree: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Of every parameter, and the loss, of a model of two layers."""
    torch.manual_seed(0)
    types = [mixer, "attn"]
    config = HypeNetConfig(**SHAPE, num_hidden_layers=2, mixer_types=types)
    model = HypeNetForCausalLM(config).to("cuda", dtype).train()
    ids = torch.randint(0, SEPARATOR, (B, T))
    ids[:, [100, 255, 400]] = SEPARATOR
    objective = NextToken(model, separator=SEPARATOR if packed else None, sequence=SequenceGroup(degree))
    asked = objective.ask(ids)()
    loss, _ = objective(ids.cuda(), **asked)
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
    import faulthandler

    faulthandler.dump_traceback_later(110)
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.all_to_all_single, dist.all_gather = through_host(dist.all_to_all_single), through_host(dist.all_gather)
    found = [gradients(*case, degree=2) for case in CASES]
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


def test_two_ranks_compute_what_one_does():
    """As near as one process in half precision is to single precision, within a factor."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (f"{folder}/store", f"{folder}/results"), nprocs=2)
        both = torch.load(f"{folder}/results")
    for case, found in zip(CASES, both, strict=True):
        one, exact = gradients(*case, degree=1), gradients(*case, degree=1, dtype=torch.float32)

        def off(values, exact=exact):
            return {name: float((x - exact[name]).norm() / exact[name].norm()) for name, x in values.items()}

        rounding = off(one)
        for name, apart in off(found).items():
            assert apart <= 2 * rounding[name] + 2e-3, (case, name, apart, rounding[name])
