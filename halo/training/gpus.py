"""The rates and sizes of GPUs, for MFU and `plan`. For a GPU that is not in this table, nothing is guessed.

Peaks (bf16 with fp32 accumulation, without sparsity), bandwidths and links are those of the data sheets.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from halo.errors import UserError
from halo.tables import suggest


@dataclass(frozen=True, kw_only=True)
class GPU:
    name: str
    """Its name on a command line."""
    device: str
    """The name that its driver reports."""
    peak: float
    """FLOP/s of dense bf16 matrix products."""
    reached: float | None = None
    """FLOP/s of a large bf16 matrix product, if it was measured (docs/benchmarks.md)."""
    memory: float
    """GiB that torch reports."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s that it receives from the other GPUs of its node: over NVLink if it has that, else over PCIe."""
    network: float
    """Bytes/s that it receives from other nodes, in usual machines with one network adapter for each GPU."""
    fp8: bool = True
    """Whether it has FP8 products (halo/teacher/fp8.py)."""


_GPUS = (
    GPU(
        name="a100-40gb",
        device="NVIDIA A100-SXM4-40GB",
        peak=312e12,
        memory=39.4,
        bandwidth=1.555e12,
        link=300e9,
        network=25e9,
        fp8=False,
    ),
    GPU(
        name="a100",
        device="NVIDIA A100-SXM4-80GB",
        peak=312e12,
        memory=79.1,
        bandwidth=2.039e12,
        link=300e9,
        network=25e9,
        fp8=False,
    ),
    GPU(
        name="a100-pcie",
        device="NVIDIA A100 80GB PCIe",
        peak=312e12,
        memory=79.1,
        bandwidth=1.935e12,
        link=32e9,
        network=12.5e9,
        fp8=False,
    ),
    GPU(
        name="a800",
        device="NVIDIA A800-SXM4-80GB",
        peak=312e12,
        memory=79.1,
        bandwidth=2.039e12,
        link=200e9,
        network=25e9,
        fp8=False,
    ),
    GPU(
        name="h100",
        device="NVIDIA H100 80GB HBM3",
        peak=989e12,
        reached=800e12,
        memory=79.1,
        bandwidth=3.35e12,
        link=450e9,
        network=50e9,
    ),
    GPU(
        name="h100-pcie",
        device="NVIDIA H100 PCIe",
        peak=756e12,
        memory=79.1,
        bandwidth=2.04e12,
        link=64e9,
        network=25e9,
    ),
    GPU(name="h800", device="NVIDIA H800", peak=989e12, memory=79.1, bandwidth=3.35e12, link=200e9, network=50e9),
    GPU(
        name="h200",
        device="NVIDIA H200",
        peak=989e12,
        reached=800e12,
        memory=139.8,
        bandwidth=4.8e12,
        link=450e9,
        network=50e9,
    ),
    GPU(name="h20", device="NVIDIA H20", peak=148e12, memory=95.1, bandwidth=4.0e12, link=450e9, network=50e9),
    GPU(name="b200", device="NVIDIA B200", peak=2250e12, memory=178.4, bandwidth=8.0e12, link=900e9, network=50e9),
    GPU(name="l40s", device="NVIDIA L40S", peak=362e12, memory=44.4, bandwidth=0.864e12, link=32e9, network=12.5e9),
    GPU(
        name="rtx4090",
        device="NVIDIA GeForce RTX 4090",
        peak=165e12,
        memory=23.5,
        bandwidth=1.008e12,
        link=32e9,
        network=12.5e9,
    ),
)

GPUS: Mapping[str, GPU] = {gpu.name: gpu for gpu in _GPUS}


def find_gpu(name: str) -> GPU:
    """Raises:
    UserError: no GPU of this name is known.
    """
    if name.lower() not in GPUS:
        raise UserError(f"no GPU '{name}'{suggest(name.lower(), list(GPUS))}; known: {', '.join(GPUS)}")
    return GPUS[name.lower()]


def gpu_of_device(device_name: str) -> GPU | None:
    """The GPU that a driver calls `device_name`, or None: not known. Nor is a slice of a GPU (MIG)."""
    return next((gpu for gpu in _GPUS if gpu.device == device_name), None)
