"""GPU kernels: where fla's serve, and the message where they cannot.

Everything has a plain torch form, which runs where a kernel does not: on the CPU, and in single or double precision.
A mixer calls kernels through `kernel` alone: so a plan can measure it without a GPU (`stand_in`).
"""

import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

FLA = "0.6.0"
"""The first fla-core whose operations are called as here."""


@torch.compiler.assume_constant_result
def plain_only() -> bool:
    """Whether HYPENET_PLAIN=1 asks for the plain form of everything that has a fast one: to look for a fault, and to
    compare (docs/performance.md). The environment is read at each call, and must be the same in all processes."""
    return os.environ.get("HYPENET_PLAIN", "0") not in ("", "0")


_stand_in: Callable[..., Any] | None = None


@contextmanager
def stand_in(run: Callable[..., Any]) -> Iterator[None]:
    """Within, tensors on the meta device go to `run(operation, state, *args, **kwargs)` in place of fla's kernels."""
    global _stand_in
    before, _stand_in = _stand_in, run
    try:
        yield
    finally:
        _stand_in = before


def serves(x: Tensor) -> bool:
    """Whether fla's kernels compute `x` and its like: half precision on a GPU, fla-core installed."""
    if _stand_in is not None:
        return x.is_meta
    half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return half and not torch.compiler.is_exporting() and not plain_only() and _installed()


def has_triton() -> bool:
    """Whether this project's own kernels can be run (hypenet/fused.py). An exported graph holds operators of torch."""
    return not torch.compiler.is_exporting() and not plain_only() and _triton_is_there()


def unvalued(x: Tensor) -> bool:
    """Whether nothing may depend on the values of x: a graph is recorded, which serves all values, or it has none."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


P = ParamSpec("P")


def kept(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """A function whose results are kept for later calls with the same arguments.

    But not those made while a graph is recorded or tensors are without values: they mean nothing outside of that call.
    """

    # What is kept must also serve where gradients are wanted.
    keep: Callable[..., Tensor] = cache(torch.inference_mode(False)(make))

    @wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        plain = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0
        return keep(*args, **kwargs) if plain else make(*args, **kwargs)

    return get


def kernel(operation: str, *, state: int) -> Callable[..., Any]:
    """An operation of fla by the name of its module and its own, e.g. "simple_gla.chunk_simple_gla".

    torch.compile leaves it as it is: fla chooses among its kernels in ways that cannot be traced.

    Args:
        state: numbers in the state of a head. The kernel keeps a state for each chunk of tokens; a plan counts them.
    """
    return partial(_run_kernel, operation, state)


@torch.compiler.disable
def _run_kernel(operation: str, state: int, *args: Any, **kwargs: Any) -> Any:
    if _stand_in is not None:
        return _stand_in(operation, state, *args, **kwargs)
    module, _, name = operation.partition(".")
    # Imported by name: transformers treats every import statement in exported model code as a hard requirement.
    return getattr(importlib.import_module(f"fla.ops.{module}"), name)(*args, **kwargs)


@torch.compiler.assume_constant_result
@cache
def _triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_gated_backward(gate: Tensor) -> None:
    """Refuse the backward of fla's kernels for a gate per token and head where triton is known to miscompile it.

    Raises:
        RuntimeError: a gradient is wanted, and this triton computes a wrong one on this GPU.
    """
    wanted = torch.is_grad_enabled() and gate.requires_grad and not gate.is_meta
    if wanted and _hopper(gate.device) and _triton_miscompiles():
        raise RuntimeError(
            f"triton {_triton_version()} computes wrong gradients for gated linear attention on Hopper GPUs: "
            "pip install 'triton>=3.7.1', or tilelang, which fla then uses in its place."
        )


@torch.compiler.assume_constant_result
@cache
def _installed() -> bool:
    slow = "RNN layers run in plain torch, many times slower, without fla-core %s or newer (pip install fla-core): %s"
    try:
        fla = importlib.import_module("fla")
        importlib.import_module("fla.ops.simple_gla")
    except ImportError as error:
        logger.warning(slow, FLA, error)
        return False
    if _numbers(fla.__version__) < _numbers(FLA):  # other names and orders of arguments
        logger.warning(slow, FLA, f"this one is {fla.__version__}")
        return False
    return True


@cache
def _hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@cache
def _triton_miscompiles() -> bool:
    if importlib.util.find_spec("tilelang"):
        return False
    return (3, 4, 0) <= _numbers(_triton_version()) < (3, 7, 1)


def _numbers(version: str) -> tuple[int, ...]:
    """ "3.7.0+git1" -> (3, 7, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _triton_version() -> str:
    return importlib.import_module("triton").__version__
