"""The token shards of a training stage: named by the preset, or prepared from its corpus into the run's folder."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from halo.config import Training
from halo.context import Context
from halo.data.corpus import text_digest, text_files
from halo.data.shards import prepare_shards, verify_shards
from halo.distributed import on_rank0
from halo.errors import UserError
from halo.graph import NEEDLE_RECIPE
from halo.models.tokenizer import load_tokenizer, tokenizer_hash


def shards_for(context: Context, stage: str) -> str | Path:
    """The verified shards that `stage` trains on; prepared first where the preset names none. On all ranks.

    Raises:
        UserError: as `ensure_shards`.
    """
    return on_rank0(_ensure_for, context, stage)


def check_data(context: Context, stage: str) -> None:
    """Whether a stage has shards that fit, or text to prepare them from. On rank 0; prepares nothing.

    Raises:
        UserError: as `ensure_shards`.
    """
    training = context.settings(stage)
    if training.shards or not training.corpus.source or (context.run / "data" / stage).exists():
        _ensure_for(context, stage)
    else:
        text_files(Path(training.corpus.source))


def _ensure_for(context: Context, stage: str) -> str | Path:
    own = context.run / "data" / stage
    return ensure_shards(context.settings(stage), stage, own, load_tokenizer(context.teacher))


def ensure_shards(training: Training, stage: str, own: Path, tokenizer: PreTrainedTokenizerFast) -> str | Path:
    """The folder or URL of a stage's verified shards. On one rank.

    Args:
        own: the folder in which to prepare shards from the stage's corpus, if the preset names none.

    Raises:
        UserError: neither shards nor a corpus are set, or the shards are not what the stage needs.
    """
    corpus = training.corpus
    folder = training.shards or own
    if not training.shards and not corpus.source:
        raise UserError(
            f"{stage} has no data: prepare shards with data/prepare_fineweb_edu.py and pass --{stage}.shards FOLDER, "
            f"or set {stage}.corpus.source"
        )
    if not training.shards and not own.exists():
        prepare_shards(
            corpus.source,
            tokenizer,
            own,
            seq_len=training.seq_len,
            seed=training.seed,
            samples=corpus.samples or None,
            needle_fraction=corpus.needles,
        )
    manifest = verify_shards(folder, tokenizer_hash(tokenizer), training.seq_len)
    if not training.shards:
        wanted = {"source": corpus.source, "seed": training.seed, "needle_fraction": corpus.needles}
        if corpus.samples:
            wanted["samples"] = corpus.samples
        if corpus.needles:
            wanted["needle_recipe"] = NEEDLE_RECIPE
        for key, value in wanted.items():
            if (found := manifest.get(key)) != value:
                raise UserError(
                    f"{folder} was prepared with {key} = {found!r}, now {value!r}: remove it to prepare it anew"
                )
        if Path(corpus.source).exists() and manifest.get("source_digest") != text_digest(corpus.source):
            raise UserError(
                f"{folder} was not prepared from the text that {corpus.source} holds now: remove it to prepare it anew"
            )
    if manifest["samples"] < training.batch:
        raise UserError(
            f"{folder} holds {manifest['samples']} samples, fewer than one batch of {training.batch}: prepare more text"
        )
    return folder
