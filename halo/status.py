"""The progress of a run, read from its folder and from Slurm's queue. Answers at once: it imports no torch."""

import os
import re
import shlex
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from halo.config import Config
from halo.errors import UserError
from halo.graph import RUN_CONFIG, SIZES, STAGE_RECORD, STAGES, Stage
from halo.json_files import parse_json, read_json
from halo.tables import build, read_toml

RECENT = 20
"""Speed is the median over this many steps."""
QUIET = 120.0
"""Seconds. Without Slurm, a training stage counts as running if its last step is younger, or younger than ten steps."""
DATA_SCRIPT = "prepare_data.sh"
"""Runs no stage. It belongs to a run if its options name the run's preset or folder, as those of slurm/table2.sh do."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A job in Slurm's queue."""

    id: str
    state: str
    script: str
    """The file's name."""
    elapsed: str
    limit: str
    where: str
    """The nodes on which it runs, or why it waits."""

    def __str__(self) -> str:
        if self.state == "RUNNING":
            return f"job {self.id} runs on {self.where}, {self.elapsed} of {self.limit}"
        return f"job {self.id} {self.state.lower()} {self.where}".rstrip()


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    record: Stage
    state: str
    """missing, queued, running, interrupted or complete."""
    step: int = 0
    steps: int = 0
    """0: the stage does not train."""
    checkpoint: int | None = None
    """The step of the last checkpoint."""
    loss: float | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    """How long a complete stage took; else how long it will still take."""
    age: float | None = None
    """Seconds since its last step."""
    zero: int | None = None
    """The ZeRO stage of the last checkpoint."""
    taken_from: str | None = None
    """The folder of the run that did the work, if it was another."""
    jobs: tuple[SlurmJob, ...] = ()

    @property
    def name(self) -> str:
        return self.record.name


class _Summary(TypedDict, total=False):
    loss: float
    seconds: float


class _Written(TypedDict):
    """What is read of a stage.json."""

    summary: _Summary
    taken_from: NotRequired[str | None]


class _Step(TypedDict):
    """What is read of a line of metrics.jsonl."""

    step: int
    loss: NotRequired[float | None]
    tokens_per_s: float
    step_s: float


class _SavedState(TypedDict):
    """What is read of a checkpoint's state.json."""

    zero_stage: int


def stages_in(run: Path, jobs: Sequence[SlurmJob] | None) -> list[StageStatus]:
    """Every stage of a conversion, and pretraining if the run has it.

    Args:
        jobs: the run's jobs in Slurm's queue; None if the run does not use Slurm, or the queue cannot be read.

    Raises:
        UserError: there is no run, or a file of it cannot be read.
    """
    config = _config(run)
    stages: dict[str, StageStatus] = {}
    for record in STAGES.values():
        if record.conversion or (run / record.name).is_dir():
            ready = all(stages[before].state == "complete" for before in record.inputs)
            steps = getattr(getattr(config, record.name), "steps", 0) if record.trains else 0
            stages[record.name] = _status(run, record, steps, ready, jobs)
    return list(stages.values())


def jobs_of(run: Path) -> list[SlurmJob]:
    """The jobs in Slurm's queue that were submitted for `run`.

    Raises:
        UserError: Slurm does not answer.
    """
    fields = "%i|%T|%M|%l|%R|%Z|%o"
    command = ["squeue", "--me", "--noheader", f"--format={fields}"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired as error:
        raise UserError("squeue does not answer: try again, or see scontrol ping") from error
    if listed.returncode:
        raise UserError(f"squeue failed: {listed.stderr.strip().splitlines()[-1]}")
    jobs = []
    for line in listed.stdout.splitlines():
        number, state, elapsed, limit, where, folder, typed = line.split("|", 6)
        script = typed.split(" ", 1)[0]
        if (Path(folder) / _run_of(Path(script), typed)).resolve() == run.resolve():
            name = Path(script).name
            jobs.append(SlurmJob(id=number, state=state, script=name, elapsed=elapsed, limit=limit, where=where))
    return jobs


def next_command(run: Path, stages: Sequence[StageStatus]) -> str:
    """What to type now, as one line."""
    for stage in stages:
        if stage.state == "complete":
            continue
        if stage.state in ("running", "queued"):
            log = _log(run, stage)
            return f"nothing: {stage.name} is {stage.state}" + (f"; tail -f {log}" if log else "")
        preset = _config(run).name
        options = f"--preset {shlex.quote(preset)} --run {shlex.quote(str(run))}"
        size = next((size for size, of in SIZES.items() if of == preset), None)
        if size and stage.record.script and shutil.which("sbatch"):
            return f"sbatch slurm/{stage.record.script_for(size)} {options}"
        zero = f" --ds_config ds_configs/zero{stage.zero}.json" if stage.zero else ""
        return f"deepspeed launcher/{stage.record.launcher} {options}{zero}"
    return f"nothing: the run is complete; its tables are {run / 'niah' / 'niah.md'} and {run / 'csr' / 'csr.md'}"


def status_text(run: Path) -> str:
    """The whole answer, for a terminal."""
    jobs, lines = None, []
    if shutil.which("squeue"):
        try:
            jobs = jobs_of(run)
        except UserError as error:
            lines.append(f"  its jobs are not known: {error}")
    if jobs and not (run / RUN_CONFIG).is_file():
        waiting = [f"  {job.script:<20} {job}" for job in jobs]
        return "\n".join([f"{run}: not begun", *waiting, "next: nothing: its jobs are in the queue"]) + "\n"
    config = _config(run)
    lines.insert(0, f"{run}: {config.name}, from {config.teacher}")
    lines += [f"  {'data':<23} {job}" for job in jobs or () if job.script == DATA_SCRIPT]
    by_slurm = jobs or (run / "slurm").is_dir()
    stages = stages_in(run, jobs if by_slurm else None)
    for stage in stages:
        lines.append(f"  {stage.name:<10} {stage.state:<12} {'; '.join(_details(stage))}".rstrip())
        lines += [f"{'':26}{job}" for job in stage.jobs]
    return "\n".join([*lines, f"next: {next_command(run, stages)}"]) + "\n"


def duration(seconds: float) -> str:
    """A time in the unit that suits it: 42 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _details(stage: StageStatus) -> list[str]:
    parts = []
    if stage.steps and stage.state in ("running", "interrupted"):
        saved = "no checkpoint" if stage.checkpoint is None else f"last checkpoint {stage.checkpoint:,}"
        parts.append(f"step {stage.step:,} of {stage.steps:,}, {saved}")
    if stage.loss is not None:
        parts.append(f"loss {stage.loss:.4f}")
    if stage.tokens_per_s is not None:
        parts.append(f"{stage.tokens_per_s:,.0f} tokens/s")
    if stage.seconds is not None:
        parts.append(duration(stage.seconds) + (" left" if stage.state != "complete" else ""))
    if stage.age is not None and stage.state != "complete":
        parts.append(f"last step {duration(stage.age)} ago")
    if stage.taken_from:
        parts.append(f"taken from {stage.taken_from}")
    return parts


def _status(run: Path, record: Stage, steps: int, ready: bool, all_jobs: Sequence[SlurmJob] | None) -> StageStatus:
    """
    Args:
        ready: all inputs of the stage are complete, so that a running job of its script is at this stage.
    """
    folder = run / record.name
    jobs = tuple(job for job in all_jobs or () if _runs(job.script, record))
    lines = _last_steps(folder / "metrics.jsonl") if steps else []
    last = lines[-1] if lines else None
    speed = statistics.median(line["tokens_per_s"] for line in lines) if lines else None
    if (folder / STAGE_RECORD).is_file():
        written = read_json(folder / STAGE_RECORD, _Written, f"remove {folder} to make it again")
        return StageStatus(
            record=record,
            state="complete",
            loss=written["summary"].get("loss"),
            tokens_per_s=speed,
            seconds=written["summary"].get("seconds"),
            taken_from=written.get("taken_from"),
            jobs=jobs,
        )
    step_s = statistics.median(line["step_s"] for line in lines) if lines else 0.0
    age = time.time() - (folder / "metrics.jsonl").stat().st_mtime if lines else None
    checkpoint, zero = _checkpoint(folder / "checkpoints")
    recent = all_jobs is None and age is not None and age < max(QUIET, 10 * step_s)
    if recent or (ready and any(job.state in ("RUNNING", "COMPLETING", "CONFIGURING") for job in jobs)):
        state = "running"
    elif jobs:
        state = "queued"
    else:
        state = "interrupted" if folder.is_dir() else "missing"
    step = last["step"] + 1 if last else 0
    return StageStatus(
        record=record,
        state=state,
        step=step,
        steps=steps,
        checkpoint=checkpoint,
        loss=last.get("loss") if last else None,
        tokens_per_s=speed,
        seconds=(steps - (step if state == "running" else checkpoint or 0)) * step_s if lines else None,
        age=age,
        zero=zero,
        jobs=jobs,
    )


def _runs(script: str, record: Stage) -> bool:
    return re.fullmatch(record.script_for(r"\w+"), script) is not None


def _run_of(script: Path, typed: str) -> str:
    """The folder of the run that a script of slurm/ works on, from its options, as slurm/common.sh finds it."""
    run = re.findall(r"--run[ =](.*?)(?= --|$)", typed)  # squeue does not quote: a folder's name may have blanks
    if run:
        return run[-1]
    preset = re.findall(r"--preset[ =](\S+)", typed)
    if not preset and script.is_file():
        preset = re.findall(r"^launch .*--preset (\S+)", script.read_text(), re.MULTILINE)
    return str(Path(os.environ.get("HALO_RUNS", "runs")) / Path(preset[-1]).stem) if preset else ""


def _log(run: Path, stage: StageStatus) -> Path | None:
    """Rank 0's log of the job that runs the stage."""
    for job in stage.jobs:
        logs = list((run / "slurm").glob(f"*-{job.id}/rank-0.log"))
        if job.state == "RUNNING" and logs:
            return logs[0]
    return None


def _config(run: Path) -> Config:
    path = run / RUN_CONFIG
    if not path.is_file():
        raise UserError(f"no run in {run} (no config.toml): give the folder that a launcher's --run names")
    return build(Config, read_toml(path), where=str(path))


def _last_steps(path: Path) -> list[_Step]:
    """The last RECENT lines of a metrics.jsonl. A last line that is half-written is left out."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        whole = [line for line in file.read().split(b"\n")[-RECENT - 1 : -1] if line.startswith(b"{")]
    return [parse_json(line, _Step, f"a line of {path}", "the stage's next start repairs it") for line in whole]


def _checkpoint(folder: Path) -> tuple[int | None, int | None]:
    """The step of the checkpoint from which a stage resumes, and its ZeRO stage."""
    pointer = folder / "latest"
    if not pointer.is_file():
        return None, None
    name = pointer.read_text(errors="replace").strip()
    if not re.fullmatch(r"step-[0-9]{9,}", name):
        raise UserError(f"{pointer} names no checkpoint: remove it to resume from the newest one")
    checkpoint = folder / name
    state = read_json(checkpoint / "state.json", _SavedState, f"remove {checkpoint} to resume from another")
    return int(name.removeprefix("step-")), state["zero_stage"]
