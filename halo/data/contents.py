"""What is behind the paths of a run's settings, as digests: stages are made from text and shards, not from their names.

A folder of shards is known by its files' digests, which its manifest has; a corpus by its files; held-out text by the
documents that are read of it.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from halo.config import Training
from halo.data.corpus import text_digest
from halo.data.held_out import held_out_digest
from halo.data.shards import open_manifest
from halo.data.storage import is_remote
from halo.errors import UserError
from halo.graph import HELD_OUT_TEXT, STAGE_RECORD, STAGES, stages_to
from halo.job import Job

P = ParamSpec("P")


def contents_of(job: Job) -> dict[str, str]:
    """The digests of what a job's stages and those before them read.

    What cannot be read has none: the stage that needs it says why, and a finished one does not need it. What a finished
    stage has read is not asked for over the network.

    Returns:
        Digests: of what a stage trains on under its name, of held-out text under HELD_OUT_TEXT.
    """
    found = {}
    stages = {name for stage in job.stages for name in stages_to(stage, prepare=True)}
    for name in stages:
        training = getattr(job.config, name, None)
        if isinstance(training, Training):
            finished = (job.run / name / STAGE_RECORD).is_file()
            found[name] = _or_none(_of_training, training, job.run / "data" / name, finished)
    if job.config.heldout and any("heldout" in STAGES[name].sees for name in stages):
        found[HELD_OUT_TEXT] = _or_none(held_out_digest, job.config.heldout)
    return {name: digest for name, digest in found.items() if digest}


def _or_none(digest: Callable[P, str | None], *args: P.args, **kwargs: P.kwargs) -> str | None:
    try:
        return digest(*args, **kwargs)
    except (UserError, OSError):
        return None


def _of_training(training: Training, own: Path, finished: bool) -> str | None:
    if training.shards:
        if finished and is_remote(training.shards):
            return None
        files = open_manifest(training.shards)["sha256"]
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    if own.exists():
        return open_manifest(own).get("source_digest")
    return text_digest(training.corpus.source) if training.corpus.source else None
