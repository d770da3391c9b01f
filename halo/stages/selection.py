"""Layer selection: replace one attention layer at a time, and keep those that recall needs (Sec. 4.3, Eq. 8 and 9).

Writes `scores.json` (recall and CSR of every one-layer replacement, importance, ranking, the layers to keep) and
`scores.png`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from typing_extensions import TypedDict

from halo.context import Context
from halo.data.held_out import HeldOut, check_held_out
from halo.data.needle import VARIANTS
from halo.distributed import device, on_rank0
from halo.errors import UserError
from halo.measuring.evaluation import CHOICES, build_questions, continuation_accuracy, needle_recall
from halo.measuring.figures import measuring
from halo.measuring.importance import default_k, importance, ranking
from halo.measuring.report import selection_png
from halo.models.attention_functions import use_attention
from halo.models.loading import load_model_config, load_teacher
from halo.models.tokenizer import load_tokenizer
from halo.stages.align import load_mixers, new_mixers

SCORES = "scores.json"


class Kept(TypedDict):
    """What other stages read of it."""

    attention_layers: list[int]


def check(context: Context) -> None:
    """Raises:
    UserError: the teacher has no such layers, or as `check_held_out`.
    """
    settings, layers = context.config.selection, load_model_config(context.teacher).num_hidden_layers
    if not 1 <= (settings.attention_layers or default_k(layers)) < layers:
        raise UserError(
            f"selection.attention_layers = {settings.attention_layers}, but the teacher has {layers} layers, of which "
            "at least one must be kept and one converted"
        )
    if not set(settings.layers) <= set(range(layers)):
        raise UserError(f"selection.layers = {list(settings.layers)}, but the teacher's layers are 0 to {layers - 1}")
    if len(settings.layers) == layers:
        raise UserError("selection.layers names all layers of the teacher: nothing would be converted")
    if not settings.layers:
        check_held_out(context.config.heldout)


def run(context: Context) -> None:
    settings = context.config.selection
    teacher = use_attention(load_teacher(context.teacher), context.attention["selection"]["teacher"])
    teacher = teacher.eval().to(device())
    keep = settings.attention_layers or default_k(len(teacher.model.layers))
    report: dict[str, Any] = {"attention_layers": sorted(settings.layers)}
    cost = {"tokens": 0, "seconds": 0.0}
    if not settings.layers:
        report, cost = _measure(context, teacher)
        report["importance"] = importance(report["recall"], report["csr"], settings.epsilon)
        report["ranking"] = ranking(report["importance"])
        report["attention_layers"] = sorted(report["ranking"][:keep])

    def finish() -> None:
        folder = context.folder("selection")
        folder.save_json(SCORES, report)
        if not settings.layers:
            kept = report["attention_layers"]
            folder.save_bytes("scores.png", selection_png(report["recall"], report["csr"], kept))
        folder.complete([SCORES], cost | {"parameters": 0})

    on_rank0(finish)


def _measure(context: Context, teacher: PreTrainedModel) -> tuple[dict[str, Any], dict[str, float]]:
    """Recall and CSR of the teacher with each layer replaced, in [0, 1], and what measuring cost."""
    settings = context.config.selection
    held_out = HeldOut(context.config.heldout, load_tokenizer(context.teacher))
    needles = [
        sample
        for variant in VARIANTS
        for sample in held_out.needles(variant, settings.seq_len, settings.needles, settings.seed)
    ]
    ask, answer = settings.seq_len // 2, settings.seq_len // 8
    questions = build_questions(
        held_out.token_ids(), count=settings.questions, context=ask, continuation=answer, seed=settings.seed
    )
    attention, switches = context.attention["selection"]["student"], context.config.architecture.switches()
    mixers = new_mixers(teacher, context.config.rnn_mixer, attention=attention, **switches)
    weights = load_mixers(context.folder("align"))
    recall, csr = [], []
    batch_tokens = context.config.niah.batch_tokens
    batch = max(1, batch_tokens // settings.seq_len)
    choices = len(questions) * CHOICES
    measure_recall = partial(needle_recall, teacher, needles, batch=batch)
    measure_csr = partial(continuation_accuracy, teacher, questions, batch_tokens=batch_tokens)
    with measuring(context.folder("selection"), len(mixers) * (len(needles) + choices), "selection") as measure:
        for layer, mixer in mixers.items():
            mixer.load_state_dict(weights[layer])
            with replaced(teacher, layer, mixer):
                recall.append(measure(f"recall without {layer}", len(needles), measure_recall))
                csr.append(measure(f"csr without {layer}", choices, measure_csr))
    tokens = len(mixers) * (len(needles) * settings.seq_len + choices * (ask + answer))
    return {"recall": recall, "csr": csr}, {"tokens": tokens, "seconds": measure.seconds}


@contextmanager
def replaced(teacher: PreTrainedModel, layer: int, mixer: nn.Module) -> Iterator[None]:
    """M^(i) of Eq. 8: the teacher with one attention layer replaced by `mixer`, while the block lasts."""
    original = teacher.model.layers[layer].self_attn
    teacher.model.layers[layer].self_attn = mixer.eval().to(teacher.device)
    try:
        yield
    finally:
        teacher.model.layers[layer].self_attn = original
