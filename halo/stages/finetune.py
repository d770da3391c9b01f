"""Stage 3: next-token training at long context and a small learning rate (Sec. 4.5). Writes `hybrid/`."""

from halo.context import Context
from halo.data.stage_shards import check_data, shards_for
from halo.distributed import on_rank0
from halo.measuring.probe import check_probe, probe_of
from halo.models.attention_functions import use_attention
from halo.models.build import build_hybrid
from halo.models.tokenizer import load_tokenizer, separator_id
from halo.stages.distill import HYBRID, options_of, save_hybrid
from halo.training.engine import placement
from halo.training.objectives import NextToken
from halo.training.trainer import train


def check(context: Context) -> None:
    """Raises:
    UserError: as `check_data` and `check_probe`.
    """
    check_data(context, "finetune")
    check_probe(context, "finetune")


def run(context: Context) -> None:
    folder, training = context.folder("finetune"), context.config.finetune
    shards = shards_for(context, "finetune")
    student = build_hybrid(context.run / "distill" / HYBRID, placement(context.ds_config, training))
    use_attention(student, context.attention["finetune"]["student"])
    objective = NextToken(
        student,
        separator=separator_id(load_tokenizer(context.teacher)) if training.mask_documents else None,
        **options_of(training),
    )
    probe = probe_of(context, "finetune", objective)
    result = train(objective, training, shards=shards, folder=folder, ds_config=context.ds_config, probe=probe)
    on_rank0(save_hybrid, folder, student, result)
