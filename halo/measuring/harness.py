"""Common-sense reasoning (CSR) by LM-Evaluation-Harness, as in the paper (Appendix E.2).

The harness has the tasks, their data and their metrics. It asks a function for the likelihoods of continuations.
"""

import logging
import random
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
import numpy as np
from datasets.exceptions import DatasetsError
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from halo.errors import UserError, first_line
from halo.measuring.evaluation import Pair
from halo.models.tokenizer import encode_parts
from halo.tables import suggest

Likelihoods = Callable[[list[Pair]], tuple[Tensor, Tensor]]
"""`halo.measuring.evaluation.log_likelihoods` of a model: pairs to [N] log-likelihoods and [N] bool."""

METRICS = ("acc_norm", "acc")
"""The score of a task: normalized accuracy (the log-likelihood of a choice is divided by its number of characters; the
paper's default) if the task has it, else accuracy."""
LIKELIHOODS = ("multiple_choice", "loglikelihood")
"""The kinds of tasks that need only the likelihoods of continuations."""

# Its warnings are for users of its command line, and it shows a bar for each task.
logging.getLogger("lm_eval").setLevel(logging.ERROR)
lm_eval.api.task.tqdm = partial(tqdm, disable=True)


class Tasks:
    """Tasks of the harness, with their data. Zero-shot, unless a task itself sets a number of examples.

    Args:
        names: of tasks, and of groups that have an accuracy of their own (mmlu).
        folder: more tasks, in the harness's YAML; empty: none.
        samples: use only the first `samples` of each task, also of each task in a group; 0: all.

    Raises:
        UserError: there is no such folder or task, a task has no accuracy by likelihoods, or its data is not available.
    """

    def __init__(self, names: Sequence[str], folder: str = "", samples: int = 0):
        if folder and not Path(folder).is_dir():
            raise UserError(f"the folder of tasks {folder} does not exist")
        manager = _manager(names, folder)
        known = [*manager.all_subtasks, *manager.all_groups]
        for name in names:
            if name in manager.all_tags:
                raise UserError(f"'{name}' is a tag in LM-Evaluation-Harness: name the tasks that have this tag")
            if name not in known:
                raise UserError(f"there is no task '{name}' in LM-Evaluation-Harness{suggest(name, known)}")
        self._limit = samples or None
        self._loaded = {name: _load(manager, name) for name in names}
        self.metrics = {name: self._metric(name) for name in names}
        """The metric of each task that is its score."""
        self.samples = {
            name: sum(min(len(task.eval_docs), samples or len(task.eval_docs)) for task in self._leaves(name))
            for name in names
        }

    def score(self, name: str, tokenizer: PreTrainedTokenizerFast, likelihoods: Likelihoods) -> float:
        """The score of a model in a task, in [0, 1].

        Args:
            tokenizer: the model's.
            likelihoods: asks the model.
        """
        for task in self._leaves(name):
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # the same examples for each model
        model = _LikelihoodModel(tokenizer, likelihoods)
        report = evaluate(model, self._loaded[name], limit=self._limit, bootstrap_iters=0, log_samples=False)
        # The keys are "metric,filter".
        of = {key.split(",")[0]: value for key, value in report["results"][name].items()}
        return float(of[self.metrics[name]])

    def _leaves(self, name: str) -> list[Task]:
        return list(self._loaded[name]["tasks"].values())

    def _metric(self, name: str) -> str:
        group, leaves = self._loaded[name]["groups"].get(name), self._leaves(name)
        has = set.intersection(*(set(task.aggregation()) for task in leaves))
        if group:
            has &= {aggregated.metric for aggregated in group.aggregate_metric_list or ()}
        kinds = {task.OUTPUT_TYPE for task in leaves}
        found = [metric for metric in METRICS if metric in has]
        if not found or not kinds <= set(LIKELIHOODS):
            raise UserError(
                f"the task '{name}' has no accuracy by likelihoods (it is {' and '.join(sorted(kinds))}, with "
                f"{', '.join(sorted(has)) or 'no score of its own'}): leave it out"
            )
        return found[0]


def _manager(names: Sequence[str], folder: str) -> TaskManager:
    """The manager of the folder alone, if it has all tasks: the harness's own tasks are thousands of files."""
    if folder:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    return TaskManager(include_path=folder or None)


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle their choices
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        loaded = manager.load([name])
    except (OSError, DatasetsError, ValueError, RuntimeError) as error:  # what `datasets` raises if it finds no data
        raise UserError(
            f"the data of the task '{name}' cannot be fetched: {first_line(error)}; fetch it once on a machine with a "
            "network (docs/guide.md#common-sense)"
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return loaded


class _LikelihoodModel(TemplateLM):
    """The harness's interface to a model. It tokenizes as the harness's own class for Hugging Face models does.

    But where a continuation begins is found by characters. The harness's class takes as many tokens as the context
    alone has, which may be more or fewer than it has in the whole text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, likelihoods: Likelihoods):
        super().__init__()
        self.tokenizer, self._likelihoods = tokenizer, likelihoods

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a continuation that has none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @cached_property
    def _begin(self) -> list[int]:
        """The special tokens with which the tokenizer begins a text."""
        encoded = self.tokenizer("a", return_special_tokens_mask=True)
        return encoded["input_ids"][: encoded["special_tokens_mask"].index(0)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        stripped = context.rstrip()
        parts = (stripped, context[len(stripped) :] + continuation)
        [(context_ids, continuation_ids)] = encode_parts(self.tokenizer, [parts])
        begin = [] if context.startswith(self.tokenizer.decode(self.prefix_token_id)) else self._begin
        return [*begin, *context_ids] or [self.prefix_token_id], continuation_ids

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        likely, written = self._likelihoods([(context, continuation) for _, context, continuation in requests])
        return list(zip(likely.tolist(), written.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        raise NotImplementedError("tasks of this kind are refused (LIKELIHOODS)")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        raise NotImplementedError("tasks of this kind are refused (LIKELIHOODS)")
