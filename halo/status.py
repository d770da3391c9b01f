"""Where a run stands, read from its folder and from Slurm's queue. Answers at once: it imports no torch."""

import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halo.errors import UserError
from halo.graph import INPUTS, LAUNCHERS

RECENT = 20
"""Steps over which speed is taken: their median."""
QUIET = 120.0
"""Without Slurm, a training stage runs if its last step is not older than this, or than ten steps."""
SIZES = {"hypenet-2b": "2b", "hypenet-5b": "4b", "hypenet-9b": "8b"}
"""A preset's scripts in slurm/ end with its teacher's size."""
CONFIG = "config.toml"
DATA_SCRIPT = "prepare_data.sh"
"""It belongs to no stage, nor to a run unless it was told the run's preset or folder, as slurm/table2.sh does."""
SCRIPTS = {
    "align": "stage1_{size}.sh",
    "selection": "selection_{size}.sh",
    "distill": "stage2_{size}.sh",
    "finetune": "stage3_{size}.sh",
    "scaling": "export.sh",
    "export": "export.sh",
    "niah": "niah.sh",
    "csr": "csr.sh",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of Slurm's, of one run."""

    id: str
    state: str
    script: str
    """The file's name."""
    elapsed: str
    limit: str
    where: str
    """The nodes that it runs on, or why it waits."""

    def __str__(self) -> str:
        if self.state == "RUNNING":
            return f"job {self.id} runs on {self.where}, {self.elapsed} of {self.limit}"
        return f"job {self.id} {self.state.lower()} {self.where}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
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
    """Taken by the stage, if it is complete; else left of it."""
    age: float | None = None
    """Seconds since its last step."""
    zero: int | None = None
    """The ZeRO stage of the last checkpoint."""
    jobs: tuple[Job, ...] = ()


def stages_of(run: Path, jobs: Sequence[Job] | None) -> list[Stage]:
    """Every stage of the run in `run`.

    Args:
        jobs: the run's in Slurm's queue; None where the run is not Slurm's, or that is not known.

    Raises:
        UserError: there is no run, or a file of it cannot be read.
    """
    config = _config(run)
    stages: dict[str, Stage] = {}
    for name, inputs in INPUTS.items():
        ready = all(stages[before].state == "complete" for before in inputs)
        stages[name] = _stage(run, name, config.get(name, {}).get("steps", 0), ready, jobs)
    return list(stages.values())


def jobs_of(run: Path) -> list[Job]:
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
            job = Job(id=number, state=state, script=Path(script).name, elapsed=elapsed, limit=limit, where=where)
            jobs.append(job)
    return jobs


def next_command(run: Path, stages: Sequence[Stage]) -> str:
    """What to type now, as one line."""
    for stage in stages:
        if stage.state == "complete":
            continue
        if stage.state in ("running", "queued"):
            log = _log(run, stage)
            return f"nothing: {stage.name} is {stage.state}" + (f"; tail -f {log}" if log else "")
        preset = _config(run)["name"]
        options = f"--preset {shlex.quote(preset)} --run {shlex.quote(str(run))}"
        if preset in SIZES and shutil.which("sbatch"):
            return f"sbatch slurm/{SCRIPTS[stage.name].format(size=SIZES[preset])} {options}"
        zero = f" --ds_config ds_configs/zero{stage.zero}.json" if stage.zero else ""
        return f"deepspeed launcher/{LAUNCHERS[stage.name]} {options}{zero}"
    return f"nothing: the run is complete; its tables are {run / 'niah' / 'niah.md'} and {run / 'csr' / 'csr.md'}"


def status_text(run: Path) -> str:
    """All of it, to be read in a terminal."""
    jobs, lines = None, []
    if shutil.which("squeue"):
        try:
            jobs = jobs_of(run)
        except UserError as error:
            lines.append(f"  its jobs are not known: {error}")
    if jobs and not (run / CONFIG).is_file():
        waiting = [f"  {job.script:<20} {job}" for job in jobs]
        return "\n".join([f"{run}: not begun", *waiting, "next: nothing: its jobs are in the queue"]) + "\n"
    config = _config(run)
    lines.insert(0, f"{run}: {config['name']}, from {config['teacher']}")
    lines += [f"  {'data':<23} {job}" for job in jobs or () if job.script == DATA_SCRIPT]
    by_slurm = jobs or (run / "slurm").is_dir()
    stages = stages_of(run, jobs if by_slurm else None)
    for stage in stages:
        lines.append(f"  {stage.name:<10} {stage.state:<12} {'; '.join(_details(stage))}".rstrip())
        lines += [f"{'':26}{job}" for job in stage.jobs]
    return "\n".join([*lines, f"next: {next_command(run, stages)}"]) + "\n"


def duration(seconds: float) -> str:
    """In the unit that suits: 42 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _details(stage: Stage) -> list[str]:
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
    return parts


def _stage(run: Path, name: str, steps: int, ready: bool, all_jobs: Sequence[Job] | None) -> Stage:
    """Args:
    ready: all that the stage reads is there, so that a running job of its script is at this stage.
    """
    folder = run / name
    jobs = tuple(job for job in all_jobs or () if _makes(job.script, name))
    lines = _metrics(folder / "metrics.jsonl") if steps else []
    last = lines[-1] if lines else {}
    speed = statistics.median(line["tokens_per_s"] for line in lines[-RECENT:]) if lines else None
    if (folder / "stage.json").is_file():
        summary = _read_json(folder / "stage.json")["summary"]
        return Stage(
            name=name,
            state="complete",
            loss=summary.get("loss"),
            tokens_per_s=speed,
            seconds=summary.get("seconds"),
            jobs=jobs,
        )
    step_s = statistics.median(line["step_s"] for line in lines[-RECENT:]) if lines else 0.0
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
    return Stage(
        name=name,
        state=state,
        step=step,
        steps=steps,
        checkpoint=checkpoint,
        loss=last.get("loss"),
        tokens_per_s=speed,
        seconds=(steps - (step if state == "running" else checkpoint or 0)) * step_s if lines else None,
        age=age,
        zero=zero,
        jobs=jobs,
    )


def _makes(script: str, stage: str) -> bool:
    return re.fullmatch(SCRIPTS[stage].format(size=r"\w+"), script) is not None


def _run_of(script: Path, typed: str) -> str:
    """The run's folder that a script of slurm/ works on, from how it was submitted. As slurm/common.sh finds it."""
    run = re.findall(r"--run[ =](.*?)(?= --|$)", typed)  # squeue does not quote: a folder's name may have blanks
    if run:
        return run[-1]
    preset = re.findall(r"--preset[ =](\S+)", typed)
    if not preset and script.is_file():
        preset = re.findall(r"^launch .*--preset (\S+)", script.read_text(), re.MULTILINE)
    return str(Path(os.environ.get("HALO_RUNS", "runs")) / Path(preset[-1]).stem) if preset else ""


def _log(run: Path, stage: Stage) -> Path | None:
    """Rank 0's log of the job that runs the stage."""
    for job in stage.jobs:
        logs = list((run / "slurm").glob(f"*-{job.id}/rank-0.log"))
        if job.state == "RUNNING" and logs:
            return logs[0]
    return None


def _config(run: Path) -> dict[str, Any]:
    path = run / CONFIG
    if not path.is_file():
        raise UserError(f"no run in {run} (no config.toml): give the folder that a launcher's --run names")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The last lines, as many as speed is taken over; a last line that is half-written is left out."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        whole = [line for line in file.read().split(b"\n")[-RECENT - 2 : -1] if line.startswith(b"{")]
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} has a line that is not JSON ({error}): the stage's next start mends it") from error


def _checkpoint(folder: Path) -> tuple[int | None, int | None]:
    """The step of the checkpoint that a stage goes on from, and its ZeRO stage."""
    pointer = folder / "latest"
    if not pointer.is_file():
        return None, None
    name = pointer.read_text().strip()
    return int(name.removeprefix("step-")), _read_json(folder / name / "state.json").get("zero_stage")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
