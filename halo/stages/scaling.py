"""The choice of the attention logits scaling (Eq. 11): the least loss on held-out text longer than in training.

Writes `scaling.json`: the chosen `attn_logits_scaling`, and every candidate's loss.
"""

from functools import partial

from typing_extensions import TypedDict

from halo.config import Scaling
from halo.context import Context
from halo.data.held_out import HeldOut, check_held_out
from halo.distributed import device, on_rank0
from halo.measuring.evaluation import loss_at_length, share_sequences
from halo.measuring.figures import measuring
from halo.models.attention_functions import use_attention
from halo.models.loading import load_hybrid
from halo.models.tokenizer import load_tokenizer
from halo.parallel.sequence import SequenceGroup
from halo.stages.distill import HYBRID
from hypenet.configuration_hypenet import hype_scaling

SCALING = "scaling.json"


class Scaled(TypedDict):
    """What other stages read of it."""

    attn_logits_scaling: str | float


def check(context: Context) -> None:
    """Raises:
    UserError: as `check_held_out`.
    """
    check_held_out(context.config.heldout)


def lacking(windows: int, settings: Scaling) -> str:
    """What is measured where held-out text has fewer windows than `documents`; empty where it has them all."""
    if windows == settings.documents:
        return ""
    found = f"{windows} windows of {settings.seq_len:,} tokens"
    return f"`heldout` has {found}, not {settings.documents}: measured on these"


def run(context: Context) -> None:
    settings = context.config.scaling
    held_out = HeldOut(context.config.heldout, load_tokenizer(context.teacher))
    samples = held_out.windows(settings.seq_len, settings.documents)
    if fewer := lacking(len(samples), settings):
        on_rank0(print, f"scaling: {fewer}", flush=True)
    hybrid = load_hybrid(context.run / "finetune" / HYBRID).to(device())
    use_attention(hybrid, context.attention["scaling"]["student"])
    group = SequenceGroup(settings.sequence_parallel)
    share_sequences(hybrid, group)
    scaled = {f"{a:g}": hype_scaling(a) if settings.form == "hype" else a for a in settings.candidates}
    specs: dict[str, str | float | None] = {"none": None} | scaled
    losses = {}
    folder = context.folder("scaling")
    with measuring(folder, len(specs) * len(samples), "scaling") as measure:
        for name, spec in specs.items():
            hybrid.config.attn_logits_scaling = spec
            losses[name] = measure(name, len(samples), partial(loss_at_length, hybrid, samples, group=group))
    best = min(scaled, key=lambda name: losses[name])

    def finish() -> None:
        folder.save_json(SCALING, {"attn_logits_scaling": scaled[best], "loss": losses})
        tokens = samples.numel() * len(specs)
        folder.complete([SCALING], {"tokens": tokens, "parameters": 0, "seconds": measure.seconds})

    on_rank0(finish)
