"""What is said where fla's kernels cannot serve."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from hypenet import kernels


@pytest.fixture
def on_hopper(monkeypatch):
    """A function that puts a triton of some version on a Hopper GPU."""

    def pretend(version: str, tilelang: bool = False) -> None:
        kernels._triton_miscompiles.cache_clear()
        monkeypatch.setattr(kernels, "_hopper", lambda device: True)
        monkeypatch.setattr(kernels, "_triton_version", lambda: version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if tilelang else None)

    yield pretend
    kernels._triton_miscompiles.cache_clear()


@pytest.mark.parametrize("version", ["3.4.0", "3.6.0", "3.7.0+git1234"])
def test_a_triton_that_computes_wrong_gradients_is_refused_with_the_cure(on_hopper, version):
    on_hopper(version)
    with pytest.raises(RuntimeError, match=r"triton 3\.\d\.0.* wrong gradients .* pip install 'triton>=3.7.1'"):
        kernels.check_gated_backward(torch.zeros(1, requires_grad=True))


@pytest.mark.parametrize(
    ("version", "tilelang"), [("3.3.1", False), ("3.7.1", False), ("3.10.0", False), ("3.6.0", True)]
)
def test_others_are_not(on_hopper, version, tilelang):
    on_hopper(version, tilelang)
    kernels.check_gated_backward(torch.zeros(1, requires_grad=True))


def test_without_a_gradient_nothing_is_refused(on_hopper):
    on_hopper("3.6.0")
    kernels.check_gated_backward(torch.zeros(1))
    with torch.no_grad():
        kernels.check_gated_backward(torch.zeros(1, requires_grad=True))


def test_without_fla_plain_torch_serves_and_says_so(monkeypatch):
    """One line, once."""
    said = []

    def refuse(name: str):
        raise ImportError("No module named 'fla'")

    kernels._installed.cache_clear()
    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(kernels.logger, "warning", lambda message, *args: said.append(message % args))
    assert not kernels._installed() and not kernels._installed()
    kernels._installed.cache_clear()
    assert said == [
        "RNN layers run in plain torch, many times slower, without fla-core 0.6.0 or newer (pip install fla-core): "
        "No module named 'fla'"
    ]


def test_an_older_fla_is_as_none(monkeypatch):
    """Its operations have other arguments."""
    said = []
    kernels._installed.cache_clear()
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(__version__="0.5.2"))
    monkeypatch.setattr(kernels.logger, "warning", lambda message, *args: said.append(message % args))
    assert not kernels._installed()
    kernels._installed.cache_clear()
    assert "this one is 0.5.2" in said[0]


def test_the_cpu_has_no_kernels():
    assert not kernels.serves(torch.zeros(1, dtype=torch.bfloat16))
