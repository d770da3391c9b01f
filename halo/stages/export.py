"""The finished hybrid as a Hugging Face folder: config, safetensors, tokenizer, model code, the chosen base a."""

import time

from halo.context import Context
from halo.distributed import on_rank0
from halo.models import load_hybrid
from halo.run import atomic_folder
from halo.stages.distill import HYBRID
from halo.stages.scale import SCALING
from halo.tokenizer import load_tokenizer
from hypenet.configuration_hypenet import hype_scaling
from hypenet.export import export_pretrained

MODEL = "model"


def run(context: Context) -> None:
    on_rank0(lambda: _export(context))


def _export(context: Context) -> None:
    began = time.perf_counter()
    folder = context.folder("export")
    base = context.folder("scaling").load_json(SCALING)["a"]
    with atomic_folder(folder.path / MODEL) as partial:
        export_pretrained(
            load_hybrid(context.run / "finetune" / HYBRID),
            load_tokenizer(context.teacher),
            partial,
            logits_scaling=hype_scaling(base),
        )
    seconds = round(time.perf_counter() - began, 1)
    folder.complete(folder.files_in(MODEL), {"logits_scaling_base": base, "seconds": seconds})
