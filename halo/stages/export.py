"""The finished hybrid as a Hugging Face folder: config, safetensors, tokenizer, model code, the chosen scaling."""

import time

from halo.context import Context
from halo.distributed import on_rank0
from halo.models.loading import load_hybrid
from halo.models.tokenizer import load_tokenizer
from halo.run import atomic_folder
from halo.stages.distill import HYBRID
from halo.stages.scaling import SCALING, Scaled
from hypenet.export import export_pretrained

MODEL = "model"


def run(context: Context) -> None:
    on_rank0(_export, context)


def _export(context: Context) -> None:
    began = time.perf_counter()
    folder = context.folder("export")
    scaling = context.folder("scaling").load_json(SCALING, Scaled)["attn_logits_scaling"]
    with atomic_folder(folder.path / MODEL) as partial:
        export_pretrained(
            load_hybrid(context.run / "finetune" / HYBRID),
            load_tokenizer(context.teacher),
            partial,
            logits_scaling=scaling,
            trained_length=max(context.config.distill.seq_len, context.config.finetune.seq_len),
        )
    seconds = round(time.perf_counter() - began, 1)
    folder.complete(folder.files_in(MODEL), {"attn_logits_scaling": scaling, "seconds": seconds})
