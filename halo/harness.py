"""LM-Evaluation-Harness, with which the paper measures common-sense reasoning (Appendix E.2).

The harness has the tasks, their data and metrics; how likely a continuation is, all ranks find out together.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from datasets.exceptions import DatasetsError
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halo.config import suggest
from halo.errors import UserError
from halo.evaluation import Pair, log_likelihoods
from halo.metrics import progress_bar
from halo.report import Score

METRICS = ("acc_norm", "acc")
"""A task's score: accuracy with each choice's log-likelihood divided by its characters, where a task has that
("normalized", the paper's default), else the plain one."""
LIKELIHOODS = ("multiple_choice", "loglikelihood")
"""The kinds of tasks that ask for nothing but how likely continuations are."""

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are for users of its command line


class Tasks:
    """Tasks of the harness, with their data, without examples in their prompts unless a task itself has some.

    Args:
        names: of tasks, and of groups that have an accuracy of their own (mmlu).
        folder: of tasks in the harness's YAML, which are looked at first; empty: only the harness's own.

    Raises:
        UserError: there is no such task, it has no accuracy by likelihoods, or its data cannot be had.
    """

    def __init__(self, names: Sequence[str], folder: str = ""):
        manager = _manager(names, folder)
        known = [*manager.all_subtasks, *manager.all_groups]
        for name in names:
            if name not in known:
                raise UserError(f"there is no task '{name}' in LM-Evaluation-Harness{suggest(name, known)}")
        try:
            self._loaded = manager.load(list(names))
        except (OSError, DatasetsError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"the data of {', '.join(names)} cannot be had: {reason}; fetch it once where there is a network "
                "(docs/guide.md#common-sense)"
            ) from error
        except ValueError as error:  # a task beside its group
            raise UserError(f"the tasks {', '.join(names)} cannot be measured together: {error}") from error
        self._metrics = {name: self._metric(name) for name in names}
        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, label: str, samples: int, batch_tokens: int
    ) -> dict[str, Score]:
        """What the model reaches, by task. Called by all ranks, and the same on each.

        Args:
            label: the progress bar's.
            samples: of each task, a group's too, the first so many; 0: all.
            batch_tokens: the most tokens of one forward.
        """
        asked = _Asked(model, tokenizer, label, batch_tokens)
        report = evaluate(asked, self._loaded, limit=samples or None, bootstrap_iters=0, log_samples=False)
        return {
            name: Score(
                metric=metric,
                value=_value(report["results"][name], metric),
                samples=sum(report["n-samples"][task.task_name]["effective"] for task in self._leaves(name)),
            )
            for name, metric in self._metrics.items()
        }

    def _leaves(self, name: str) -> list[Task]:
        group = self._loaded["groups"].get(name)
        return group.get_all_tasks() if group else [self._loaded["tasks"][name]]

    def _metric(self, name: str) -> str:
        group = self._loaded["groups"].get(name)
        if group:
            has = {aggregated.metric for aggregated in group.aggregate_metric_list or ()}
        else:
            has = set(self._loaded["tasks"][name].aggregation())
        kinds = {task.OUTPUT_TYPE for task in self._leaves(name)}
        found = [metric for metric in METRICS if metric in has]
        if not found or not kinds <= set(LIKELIHOODS):
            raise UserError(
                f"the task '{name}' has no accuracy by likelihoods (it is {' and '.join(sorted(kinds))}, with "
                f"{', '.join(sorted(has)) or 'no score of its own'}): leave it out"
            )
        return found[0]


def _manager(names: Iterable[str], folder: str) -> TaskManager:
    """Of the folder alone, where that has them all: the harness's own are thousands of files."""
    if folder:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= {*manager.all_subtasks, *manager.all_groups}:
            return manager
    return TaskManager(include_path=folder or None)


def _value(results: dict[str, Any], metric: str) -> float:
    """Of a metric, whatever filter stands behind its name."""
    return next(float(value) for key, value in results.items() if key.split(",")[0] == metric)


class _Asked(TemplateLM):
    """A model as the harness asks it: as its own class for Hugging Face models does, on all ranks at once.

    Every rank is the harness's only one, and has all of its requests.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str, batch_tokens: int):
        super().__init__()
        self._model, self.tokenizer, self._label, self._batch_tokens = model, tokenizer, label, batch_tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a continuation that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs: list[Pair] = [(context, continuation) for _, context, continuation in requests]
        with progress_bar(len(pairs), self._label, unit="choice") as bar:
            likely, written = log_likelihoods(self._model, pairs, batch_tokens=self._batch_tokens, progress=bar.update)
        return list(zip(likely.tolist(), written.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        raise NotImplementedError("tasks of this kind are refused (LIKELIHOODS)")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        raise NotImplementedError("tasks of this kind are refused (LIKELIHOODS)")
