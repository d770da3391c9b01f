"""Finished stages of another run, taken into this one: `--from runs/other align selection`.

A stage is taken only if this run would make the same: from the same teacher, settings and inputs. What a stage does not
see (halo/graph.py) may differ. Its files are verified, then linked or copied, and its record says where it is from.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from halo.context import Context
from halo.errors import UserError
from halo.graph import RUN_CONFIG, STAGES
from halo.run import StageFolder


def with_taken(context: Context, other: Path, names: Sequence[str]) -> Context:
    """A context that sees the stages `names` of the run in `other` as this run's. On rank 0; writes nothing.

    Stages that this run has already, and that are the same, are left as they are.

    Raises:
        UserError: there is no such run, a stage is not finished there or not what this run would make, its files are
            damaged, or this run has another one already.
    """
    if other.resolve() == context.run.resolve():
        raise UserError(f"--from {other} is this run's own folder: name another run")
    for name in sorted(names, key=list(STAGES).index):  # each after its inputs
        if not _has(context, other, name):
            context = _with(context, other, name)
    return context


def take(context: Context) -> Context:
    """Take the stages that `with_taken` found, on rank 0. Returns the context of the run that has them.

    Raises:
        UserError: the disk refuses.
    """
    for name, folder in context.taken.items():
        StageFolder(context.run / name, {}).take(StageFolder(folder, {}))
    return replace(context, taken={})


def _has(context: Context, other: Path, name: str) -> bool:
    """Whether this run has that very stage.

    Raises:
        UserError: it has another one, or an unfinished one.
    """
    own, source = StageFolder(context.run / name, {}), StageFolder(other / name, {})
    if not own.record_path.is_file():
        if own.path.exists():
            raise UserError(f"{own.path} was interrupted: remove it, or leave {name} out of --from")
        return False
    # The other run may be gone by the time that an interrupted command is typed again.
    same = own.digest() == source.digest() if source.record_path.is_file() else _is_from(own, other)
    if not same:
        raise UserError(f"{own.path} differs from {source.path}: remove it, or leave {name} out of --from")
    return True


def _is_from(own: StageFolder, other: Path) -> bool:
    return own.record().taken_from == str(other.resolve())


def _with(context: Context, other: Path, name: str) -> Context:
    """`with_taken` for one stage that this run does not have."""
    for before in STAGES[name].inputs:
        if not context.is_complete(before):
            raise UserError(
                f"{name} of {other} cannot be taken without {before}, which it was made from: "
                f"pass --from {other} {before} {name}"
            )
    seen = replace(context, taken={**context.taken, name: other / name})
    folder = seen.folder(name)
    if not folder.record_path.is_file():
        is_run = (other / RUN_CONFIG).is_file()
        what = f"{folder.path} is not finished" if is_run else f"no run in {other} (no {RUN_CONFIG})"
        raise UserError(f"{what}: --from names the folder of a run, and stages that are finished there")
    if difference := folder.mismatch():
        raise UserError(
            f"{folder.path} was made from another {difference}: give this run the same, or leave {name} out of --from"
        )
    if damage := folder.damage():
        raise UserError(f"{damage}: it cannot be taken")
    seen.verified.add(name)
    return seen
