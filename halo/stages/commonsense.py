"""Common-sense reasoning (CSR) of teacher and hybrid, zero-shot, by LM-Evaluation-Harness (Figure 1, Appendix E.2).

Writes `csr.json` and `csr.md`.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from halo.config import CommonSense
from halo.context import Context
from halo.distributed import device, on_every_rank, on_rank0
from halo.models import load_hybrid, load_teacher
from halo.report import csr_average, csr_markdown
from halo.stages.export import MODEL
from halo.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from halo.harness import Tasks


def run(context: Context) -> None:
    began = time.perf_counter()
    settings = context.config.csr
    loaded: list[Tasks] = []
    on_every_rank(lambda: loaded.append(load_tasks(settings)))
    tokenizer = load_tokenizer(context.teacher)
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "teacher": lambda: load_teacher(context.teacher),
        "hybrid": lambda: load_hybrid(context.run / "export" / MODEL),
    }
    scores = {
        name: loaded[0].score(
            load().to(device()),
            tokenizer,
            label=f"csr of {name}",
            samples=settings.samples,
            batch_tokens=settings.batch_tokens,
        )
        for name, load in models.items()
    }

    def finish() -> None:
        folder = context.folder("csr")
        report = {
            "lm_eval": version("lm_eval"),
            "average": {name: csr_average(of) for name, of in scores.items()},
            "scores": {name: {task: asdict(score) for task, score in of.items()} for name, of in scores.items()},
        }
        folder.save_bytes("csr.json", json.dumps(report, indent=2).encode() + b"\n")
        folder.save_bytes("csr.md", csr_markdown(scores).encode())
        folder.complete(["csr.json", "csr.md"], {"seconds": round(time.perf_counter() - began, 1)})

    on_rank0(finish)


def load_tasks(settings: CommonSense) -> "Tasks":
    """Raises:
    UserError: there is no such task, or its data cannot be had.
    """
    from halo.harness import Tasks  # not at every start: the harness takes seconds to import

    return Tasks(settings.tasks, settings.task_folder)
