"""Common-sense reasoning (CSR) of teacher and hybrid, zero-shot, by LM-Evaluation-Harness (Figure 1, Appendix E.2).

Rank 0 has the tasks; all ranks share the work of computing likelihoods. Writes `csr.json` and `csr.md`.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halo.config import CommonSense
from halo.context import Context
from halo.distributed import device, from_rank0, on_rank0, rank
from halo.measuring.evaluation import Pair, ProgressCallback, log_likelihoods
from halo.measuring.figures import measuring
from halo.measuring.report import Score, csr_average, csr_markdown
from halo.models.attention_functions import use_attention
from halo.models.loading import load_hybrid, load_teacher
from halo.models.tokenizer import load_tokenizer
from halo.stages.export import MODEL

if TYPE_CHECKING:
    from halo.measuring.harness import Tasks


def check(context: Context) -> None:
    """Raises:
    UserError: as `load_tasks`.
    """
    load_tasks(context.config.csr)


def run(context: Context) -> None:
    settings, folder = context.config.csr, context.folder("csr")
    tokenizer = load_tokenizer(context.teacher)
    attention = context.attention["csr"]
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "teacher": lambda: use_attention(load_teacher(context.teacher), attention["teacher"]),
        "hybrid": lambda: use_attention(load_hybrid(context.run / "export" / MODEL), attention["student"]),
    }
    accuracy: dict[str, dict[str, float]] = {}
    with measuring(folder, None, "csr") as measure:
        for name, load in models.items():
            model = load().to(device())
            of_task = partial(_accuracy, settings, model, tokenizer)
            accuracy[name] = {task: measure(f"{task}, {name}", 0, partial(of_task, task)) for task in settings.tasks}

    def finish() -> None:
        tasks = load_tasks(settings)
        scores = {
            name: {
                task: Score(metric=tasks.metrics[task], value=value, samples=tasks.samples[task])
                for task, value in of.items()
            }
            for name, of in accuracy.items()
        }
        report = {
            "lm_eval": version("lm_eval"),
            "average": {name: csr_average(of) for name, of in scores.items()},
            "scores": {name: {task: asdict(score) for task, score in of.items()} for name, of in scores.items()},
        }
        folder.save_json("csr.json", report)
        folder.save_bytes("csr.md", csr_markdown(scores).encode())
        folder.complete(["csr.json", "csr.md"], {"seconds": measure.seconds})

    on_rank0(finish)


@cache
def load_tasks(settings: CommonSense) -> "Tasks":
    """The harness's tasks with their data. On rank 0, which alone downloads it.

    Raises:
        UserError: there is no such task, or its data cannot be had.
    """
    from halo.measuring.harness import Tasks  # only where tasks are needed: the harness takes seconds to import

    return Tasks(settings.tasks, settings.task_folder, settings.samples)


def _accuracy(
    settings: CommonSense,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    progress: ProgressCallback,
) -> float:
    """The model's accuracy in a task. Rank 0 sends the harness's requests to all ranks, then an empty one."""
    likelihoods = partial(log_likelihoods, model, batch_tokens=settings.batch_tokens, progress=progress)
    reached = 0.0
    if rank() == 0:
        reached = load_tasks(settings).score(task, tokenizer, lambda pairs: likelihoods(from_rank0(pairs)))
        from_rank0(list[Pair]())
    else:
        while pairs := from_rank0(list[Pair]()):
            likelihoods(pairs)
    return from_rank0(reached)
