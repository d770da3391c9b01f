"""The choice of the logits-scaling base a (Eq. 11): least loss on held-out documents, at a length beyond training's.

Writes `scaling.json`: the base, and every candidate's loss.
"""

import time

from halo.context import Context
from halo.distributed import device, on_rank0
from halo.evaluation import loss_at_length
from halo.metrics import progress_bar
from halo.models import load_hybrid
from halo.stages.distill import HYBRID
from halo.stages.held_out import HeldOut
from halo.tokenizer import load_tokenizer
from hypenet.configuration_hypenet import hype_scaling

SCALING = "scaling.json"


def run(context: Context) -> None:
    began = time.perf_counter()
    settings = context.config.scaling
    samples = HeldOut(context.config.heldout, load_tokenizer(context.teacher)).windows(
        settings.seq_len, settings.documents
    )
    hybrid = load_hybrid(context.run / "finetune" / HYBRID).to(device())
    specs = {"none": None} | {f"{a:g}": hype_scaling(a) for a in settings.candidates}
    losses = {}
    with progress_bar(len(specs) * len(samples), "scale", unit="sample") as bar:
        for name, spec in specs.items():
            hybrid.config.attn_logits_scaling = spec
            losses[name] = loss_at_length(hybrid, samples, progress=bar.update)
    best = min(settings.candidates, key=lambda a: losses[f"{a:g}"])

    def finish() -> None:
        folder = context.folder("scaling")
        folder.save_json(SCALING, {"a": best, "loss": losses})
        seconds = round(time.perf_counter() - began, 1)
        folder.complete([SCALING], {"tokens": samples.numel() * len(specs), "parameters": 0, "seconds": seconds})

    on_rank0(finish)
