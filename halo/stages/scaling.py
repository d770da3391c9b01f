"""The choice of the attention logits scaling (Eq. 11), by needle recall and loss at several lengths; it may be none.

Writes `scaling.json` (the chosen `attn_logits_scaling`, and the whole curve), `scaling.md` and `scaling.png`.
"""

from functools import partial

from typing_extensions import TypedDict

from halo.config import Scaling
from halo.context import Context
from halo.data.held_out import HeldOut, check_held_out
from halo.data.needle import VARIANTS
from halo.distributed import device, on_rank0, say
from halo.measuring.evaluation import loss_at_length, needle_recall, share_sequences
from halo.measuring.figures import measuring
from halo.measuring.report import scaling_markdown, scaling_png
from halo.measuring.scales import Candidate, Scales
from halo.models.attention_functions import use_attention
from halo.models.loading import load_hybrid
from halo.models.tokenizer import load_tokenizer
from halo.parallel.sequence import SequenceGroup
from halo.stages.distill import HYBRID
from hypenet.configuration_hypenet import hype_scaling

SCALING = "scaling.json"


class Scaled(TypedDict):
    """What other stages read of it."""

    attn_logits_scaling: str | float | None


def check(context: Context) -> None:
    """Raises:
    UserError: as `check_held_out`.
    """
    check_held_out(context.config.heldout)


def lacking(windows: int, length: int, settings: Scaling) -> str:
    """What is measured where held-out text has fewer windows than `documents`; empty where it has them all."""
    if windows == settings.documents:
        return ""
    found = f"{windows} windows of {length:,} tokens"
    return f"`heldout` has {found}, not {settings.documents}: measured on these"


def run(context: Context) -> None:
    settings = context.config.scaling
    held_out = HeldOut(context.config.heldout, load_tokenizer(context.teacher))
    hybrid = load_hybrid(context.run / "finetune" / HYBRID).to(device())
    use_attention(hybrid, context.attention["scaling"]["student"])
    group = SequenceGroup(settings.sequence_parallel)
    share_sequences(hybrid, group)
    scaled = {f"{a:g}": hype_scaling(a) if settings.form == "hype" else a for a in settings.candidates}
    specs: dict[str, str | float | None] = {"none": None} | scaled
    candidates = [Candidate(name=n, attn_logits_scaling=spec, loss={}, recall={}) for n, spec in specs.items()]
    texts = {length: held_out.windows(length, settings.documents) for length in settings.lengths}
    for length, (windows, _) in texts.items():
        if fewer := lacking(len(windows), length, settings):
            say(f"scaling: {fewer}")
    variants = VARIANTS if settings.needles else ()
    samples = sum(len(windows) + len(variants) * settings.needles for windows, _ in texts.values())
    folder = context.folder("scaling")
    with measuring(folder, len(specs) * samples, "scaling") as measure:
        for length, (windows, _) in texts.items():
            needles = {v: held_out.needles(v, length, settings.needles, settings.seed) for v in variants}
            for candidate in candidates:
                hybrid.config.attn_logits_scaling = candidate.attn_logits_scaling
                figure, loss = f"at {length}, {candidate.name}", partial(loss_at_length, hybrid, windows, group=group)
                candidate.loss[length] = measure(f"loss {figure}", len(windows), loss)
                for variant, asked in needles.items():
                    recall = partial(needle_recall, hybrid, asked, batch=1, group=group)
                    of_length = candidate.recall.setdefault(length, {})
                    of_length[variant] = measure(f"{variant} {figure}", len(asked), recall)
    scales = Scales(
        candidates=candidates,
        needles=settings.needles,
        documents={length: (len(windows), within) for length, (windows, within) in texts.items()},
        allow_none=settings.allow_none,
    )

    def finish() -> None:
        folder.save_json(SCALING, scales.to_json())
        folder.save_bytes("scaling.md", scaling_markdown(scales).encode())
        folder.save_bytes("scaling.png", scaling_png(scales))
        tokens = len(specs) * sum(
            w.numel() + length * len(variants) * settings.needles for length, (w, _) in texts.items()
        )
        summary = {"tokens": tokens, "parameters": 0, "seconds": measure.seconds}
        folder.complete([SCALING, "scaling.md", "scaling.png"], summary)

    on_rank0(finish)
