"""Needle in a haystack over lengths (Table 2): teacher, teacher with YaRN, hybrid with and without logits scaling.

Writes `niah.json`, `niah.md` and `niah.png`.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from transformers import PreTrainedModel

from halo.context import Context
from halo.data.held_out import HeldOut, check_held_out
from halo.data.needle import VARIANTS, NeedleSample
from halo.distributed import device, on_rank0
from halo.graph import conversion
from halo.measuring.evaluation import needle_recall, share_sequences
from halo.measuring.figures import measuring
from halo.measuring.report import Cell, Results, StageCost, to_json, to_markdown, to_png
from halo.models.attention_functions import use_attention
from halo.models.loading import apply_yarn, load_hybrid, load_teacher
from halo.models.tokenizer import load_tokenizer
from halo.parallel.sequence import SequenceGroup
from halo.stages.export import MODEL

UNSCALED = "hybrid, no scaling"
"""The table's row, and the same figures as those of the hybrid if no scaling was chosen."""


def check(context: Context) -> None:
    """Raises:
    UserError: as `check_held_out`.
    """
    check_held_out(context.config.heldout)


def run(context: Context) -> None:
    settings = context.config.niah
    held_out = HeldOut(context.config.heldout, load_tokenizer(context.teacher))
    group = SequenceGroup(settings.sequence_parallel)
    rows = _models(context, group)
    cells = []
    folder = context.folder("niah")
    with measuring(folder, len(rows) * len(VARIANTS) * sum(settings.samples), "niah") as measure:
        for length, count in zip(settings.lengths, settings.samples, strict=True):
            needles = cache(partial(held_out.needles, length=length, count=count, seed=settings.seed))
            recall_of = partial(_recall, needles=needles, batch=max(1, settings.batch_tokens // length), group=group)
            recall: dict[str, dict[str, float]] = {variant: {} for variant in VARIANTS}
            for name, model_at in rows.items():
                model = model_at(length)
                measured_as = name if name != "hybrid" or model.config.attn_logits_scaling else UNSCALED
                for variant in VARIANTS:
                    figure = f"{variant} at {length}, {measured_as}"
                    recall[variant][name] = measure(figure, count, partial(recall_of, model, variant))
            cells += [Cell(variant=v, length=length, samples=count, recall=recall[v]) for v in VARIANTS]

    def finish() -> None:
        results = Results(training_length=settings.yarn_from, cells=cells, stages=_costs(context))
        folder.save_bytes("niah.json", to_json(results).encode())
        folder.save_bytes("niah.md", to_markdown(results).encode())
        folder.save_bytes("niah.png", to_png(results))
        folder.complete(["niah.json", "niah.md", "niah.png"], {"seconds": measure.seconds})

    on_rank0(finish)


def _recall(
    model: PreTrainedModel, variant: str, *, needles: Callable[[str], Sequence[NeedleSample]], **how: Any
) -> float:
    return needle_recall(model, needles(variant), **how)


def _models(context: Context, group: SequenceGroup) -> dict[str, Callable[[int], PreTrainedModel]]:
    """The table's rows: name -> the model, set up for a length in tokens."""
    teacher = load_teacher(context.teacher).to(device())
    hybrid = load_hybrid(context.run / "export" / MODEL).to(device())
    attention = context.attention["niah"]
    for model, implementation in ((teacher, attention["teacher"]), (hybrid, attention["student"])):
        share_sequences(use_attention(model, implementation), group)
    scaling, original = hybrid.config.attn_logits_scaling, context.config.niah.yarn_from

    def teacher_plain(length: int) -> PreTrainedModel:
        apply_yarn(teacher, original, original)
        return teacher

    def teacher_yarn(length: int) -> PreTrainedModel:
        apply_yarn(teacher, length, original)
        return teacher

    def hybrid_with(spec: str | None) -> Callable[[int], PreTrainedModel]:
        def at(length: int) -> PreTrainedModel:
            hybrid.config.attn_logits_scaling = spec
            return hybrid

        return at

    return {
        "teacher": teacher_plain,
        "teacher + YaRN": teacher_yarn,
        UNSCALED: hybrid_with(None),
        "hybrid": hybrid_with(scaling),
    }


def _costs(context: Context) -> list[StageCost]:
    costs = []
    for stage in conversion():
        if stage.costed:
            summary = context.folder(stage.name).record().summary
            costs.append(StageCost(name=stage.name, **{k: summary[k] for k in ("tokens", "parameters", "seconds")}))
    return costs
