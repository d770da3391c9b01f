"""Functions and files stay short, and a name means one thing: the limits of CONTRIBUTING.md."""

import ast
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path.relative_to(ROOT)
    for folder in ("hypenet", "halo", "launcher", "data")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.is_relative_to(ROOT / "halo" / "presets")  # a user's files, which we ship
]

FUNCTION, FILE = 60, 400
"""Lines at most."""
STRAIGHT_STORIES = {
    "halo/losses/linear_kl_kernel.py _kl_rows": "a Triton kernel: one pass over a row in registers, which no function "
    "can share without reading it again",
    "hypenet/fixed_decay_kernels.py segment_outputs": "a Triton kernel: one walk over a segment with the "
    "state in registers; a third of its lines are the names of its arguments",
}
"""The functions that may be longer, and why each is better in one piece."""

Sources = dict[Path, str]


def long_functions(sources: Sources) -> list[str]:
    found, excused = [], set()
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION and f"{path} {node.name}" in STRAIGHT_STORIES:
                    excused.add(f"{path} {node.name}")
                elif lines > FUNCTION:
                    found.append(f"{path} {node.name} has {lines} lines, at most {FUNCTION} are allowed")
    return found + [f"{name} is short now, or gone: it needs no excuse" for name in set(STRAIGHT_STORIES) - excused]


def long_files(sources: Sources) -> list[str]:
    lines = {path: len(source.splitlines()) for path, source in sources.items()}
    return [f"{path} has {count} lines, at most {FILE} are allowed" for path, count in lines.items() if count > FILE]


def names_of_two_things(sources: Sources) -> list[str]:
    """Names, public or not, that two modules define."""
    homes: dict[str, list[str]] = defaultdict(list)
    for path, source in sources.items():
        for name in dict.fromkeys(definitions(ast.parse(source).body)):
            # Of stages `run` and `check`, of scripts `main`: each is the same thing of another one.
            if not (name in ("run", "check") and path.parent == Path("halo/stages")) and name != "main":
                homes[name].append(str(path))
    return [f"{name} is defined in {' and in '.join(paths)}" for name, paths in sorted(homes.items()) if len(paths) > 1]


def definitions(body: list[ast.stmt]) -> Iterator[str]:
    """The names that a module defines, without dunders and type variables."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            value = node.value.func if isinstance(node.value, ast.Call) else None
            if isinstance(value, ast.Name) and value.id in ("TypeVar", "ParamSpec"):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]
            yield from (name for name in names if not (name.startswith("__") and name.endswith("__")))
        elif isinstance(node, ast.If | ast.Try):
            yield from definitions([*node.body, *node.orelse])


@pytest.mark.parametrize("rule", [long_functions, long_files, names_of_two_things])
def test_the_house_is_in_order(rule: Callable[[Sources], list[str]]) -> None:
    found = rule({path: (ROOT / path).read_text() for path in FILES})
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def _sources(**files: str) -> Sources:
    return {Path(f"halo/stages/{name}.py"): source for name, source in files.items()}


def test_violations_are_seen() -> None:
    assert any("f has 61 lines" in line for line in long_functions(_sources(a="def f():\n" + "    x = 1\n" * 60)))
    assert not any("f has" in line for line in long_functions(_sources(a="def f():\n" + "    x = 1\n" * 59)))
    assert long_files(_sources(a="x = 1\n" * 401, b="x = 1\n" * 400)) == [
        "halo/stages/a.py has 401 lines, at most 400 are allowed"
    ]
    twice = "def f(): ...\nclass C: ...\nX, _y = 1, 2\nz: int = 3\nif X:\n    w = 1\n"
    names = [line.split()[0] for line in names_of_two_things(_sources(a=twice, b=twice))]
    assert names == ["C", "X", "_y", "f", "w", "z"]


def test_what_may_repeat() -> None:
    again = "T = TypeVar('T')\nP = ParamSpec('P')\n__all__ = []\ndef run(): ...\ndef check(): ...\ndef main(): ...\n"
    assert names_of_two_things(_sources(a=again, b=again)) == []
    assert names_of_two_things({Path("halo/a.py"): "def run(): ...", Path("halo/b.py"): "def run(): ..."})
    assert (
        names_of_two_things(_sources(a="import x\nfrom y import z", b="import x\nfrom y import z\ndef f(x): z = 1"))
        == []
    )
