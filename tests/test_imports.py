"""Imports go one way: launcher, data -> halo -> hypenet -> torch, transformers, fla, triton; in halo, by its rooms.

docs/design.md, "Rooms", gives the order and its reasons.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USER_CODE = Path("halo/presets")
"""Presets are a user's files that we ship: the harness runs a task's .py by its path, no module of halo imports it, and
like any user's code it may import every room."""
FILES = [
    path.relative_to(ROOT)
    for folder in ("hypenet", "halo", "launcher", "data")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.is_relative_to(ROOT / USER_CODE)
]

GROUND, ROOF = "halo's ground floor", "halo's roof"
ROOMS = (
    "hypenet",
    GROUND,
    *("models", "data", "parallel", "teacher", "losses", "training", "measuring", "stages", "plan"),
    ROOF,
    "scripts",
)
"""An import may only point to an earlier room, or into its own."""
ON_THE_ROOF = ("pipeline", "launch", "status", "cli")
HYPENET_NEEDS = {"torch", "transformers", "fla", "triton"}


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def room_of(module: str) -> str | None:
    """None: a module of somebody else."""
    top, _, rest = module.partition(".")
    if top in ("launcher", "data"):
        return "scripts"
    if top != "halo":
        return "hypenet" if top == "hypenet" else None
    name = rest.partition(".")[0]
    if name in ROOMS:
        return name
    return ROOF if name in ON_THE_ROOF else GROUND


def imports(source: str) -> Iterator[str]:
    """Every module that `source` imports, wherever the statement is; relative ones keep their dots: `.mixers`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module


def violations(path: Path, source: str) -> list[str]:
    """The imports of `source`, a file at `path`, that break a rule."""
    here = room_of(module_of(path)) or ""
    found = []
    for module in dict.fromkeys(imports(source)):
        top, there = module.split(".")[0], room_of(module)
        if there and ROOMS.index(there) > ROOMS.index(here):
            found.append(f"{here} comes before {there}, and must not import {module}")
        if top == "deepspeed" and path != Path("halo/training/engine.py"):
            found.append(f"only halo/training/engine.py imports deepspeed, not {path}")
        if here == "scripts" and there == "scripts":
            found.append(f"a script is not imported: {module}")
        if here == "hypenet":
            # transformers copies these files one by one into an exported checkpoint.
            if module.startswith(".") and not (module[1:].isidentifier() and path.parent == Path("hypenet")):
                found.append(f"hypenet is flat: write `from .file import name`, not {module}")
            if top and top not in HYPENET_NEEDS | sys.stdlib_module_names:
                found.append(f"hypenet needs nothing but {', '.join(sorted(HYPENET_NEEDS))}, not {module}")
    return found


def circle(sources: dict[str, str]) -> list[str]:
    """The modules of a circle of imports, also of imports within functions; [] if there is none."""
    graph = {
        module: {f"hypenet{name}" if name.startswith(".") else name for name in imports(source)} - {module}
        for module, source in sources.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


def test_there_is_no_circle() -> None:
    assert circle({module_of(path): (ROOT / path).read_text() for path in FILES}) == []


@pytest.mark.parametrize("room", [room for room in ROOMS if (ROOT / "halo" / room).is_dir()])
def test_a_room_has_a_sign_and_nothing_behind_it(room: str) -> None:
    """One line that says what is in the room. No code: importing one module of a room imports no other."""
    [sign] = ast.parse((ROOT / "halo" / room / "__init__.py").read_text()).body
    assert isinstance(sign, ast.Expr) and isinstance(sign.value, ast.Constant)
    assert str(sign.value.value).endswith(".") and "\n" not in str(sign.value.value)


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
        ("halo/training/trainer.py", "from halo.measuring.figures import measuring"),
        ("halo/training/trainer.py", "def late():\n    from halo.measuring import figures"),
        ("halo/data/shards.py", "import halo.training.trainer"),
        ("halo/stages/align.py", "from halo.plan.stage import plan"),
        ("halo/context.py", "from halo.models.loading import load_teacher"),
        ("halo/run.py", "from halo import pipeline"),
        ("halo/plan/stage.py", "from halo.launch import run_job"),
        ("launcher/kd.py", "from launcher.align import main"),
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
        ("halo/training/trainer.py", "from halo.training.metrics import Metrics\nfrom halo.context import Context"),
        ("halo/plan/stage.py", "from halo.stages import align"),
        ("halo/pipeline.py", "from halo.launch import run_job"),
        ("launcher/kd.py", "from halo.pipeline import run_stages"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


def test_a_circle_is_seen() -> None:
    two = {"hypenet.a": "from .b import x", "hypenet.b": "def late():\n    from .c import y"}
    assert circle(two) == []
    assert set(circle(two | {"hypenet.c": "from .a import z"})) == {"hypenet.a", "hypenet.b", "hypenet.c"}
