"""Imports go one way: launcher, data -> halo -> hypenet -> torch, transformers, fla, triton."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path.relative_to(ROOT)
    for folder in ("hypenet", "halo", "launcher", "data")
    for path in (ROOT / folder).rglob("*.py")
]

FORBIDDEN = {"hypenet": {"halo", "launcher", "data"}, "halo": {"launcher", "data"}}
HYPENET_NEEDS = {"torch", "transformers", "fla", "triton"}


def imports(source: str) -> Iterator[str]:
    """Every module that `source` imports, wherever the statement stands; relative ones keep their dots: `.mixers`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def violations(path: Path, source: str) -> list[str]:
    """What `source`, standing at `path`, imports against the rules."""
    package = path.parts[0]
    found = []
    for module in imports(source):
        top = module.split(".")[0]
        if top in FORBIDDEN.get(package, ()):
            found.append(f"{package} must not know {module}")
        if top == "deepspeed" and path != Path("halo/training/engine.py"):
            found.append(f"only halo/training/engine.py imports deepspeed, not {path}")
        if package == "hypenet":
            # transformers copies these files one by one into an exported checkpoint.
            if module.startswith(".") and not (module[1:].isidentifier() and path.parent == Path("hypenet")):
                found.append(f"hypenet is flat: write `from .file import name`, not {module}")
            if top and top not in HYPENET_NEEDS | sys.stdlib_module_names:
                found.append(f"hypenet needs nothing but {', '.join(sorted(HYPENET_NEEDS))}, not {module}")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("hypenet/mixers.py", "import halo.config"),
        ("hypenet/mixers.py", "def late():\n    from deepspeed import zero"),
        ("hypenet/mixers.py", "import numpy"),
        ("hypenet/mixers.py", "from hypenet.cache import HypeNetCache"),
        ("hypenet/mixers.py", "from . import cache"),
        ("hypenet/mixers.py", "from .kernels.simple import attention"),
        ("hypenet/kernels/simple.py", "from .other import attention"),
        ("halo/training/trainer.py", "import deepspeed.comm as dist"),
        ("halo/training/trainer.py", "from launcher.kd import main"),
        ("data/prepare_fineweb_edu.py", "import deepspeed"),
    ],
)
def test_a_violation_is_seen(path: str, source: str) -> None:
    assert violations(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("hypenet/mixers.py", "import math\nimport torch.nn as nn\nfrom .cache import HypeNetCache"),
        ("hypenet/kernels.py", "def late():\n    from fla.ops.simple_gla import chunk_simple_gla"),
        ("halo/training/engine.py", "import deepspeed"),
        ("halo/training/trainer.py", "from hypenet.mixers import MIXERS\nfrom datasets import load_dataset"),
        ("launcher/kd.py", "from halo.pipeline import run_stage"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(Path(path), source) == []
