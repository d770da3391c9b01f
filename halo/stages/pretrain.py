"""Training a small Transformer from scratch: how the embedded teacher was made.

Writes `teacher/`: a Hugging Face folder, its tokenizer trained on the same text.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from halo.config import Pretrain
from halo.context import FREE
from halo.data.corpus import read_documents
from halo.data.needle import template_texts
from halo.data.stage_shards import ensure_shards
from halo.distributed import on_rank0
from halo.errors import UserError
from halo.job import Job
from halo.models.tokenizer import load_tokenizer, train_tokenizer
from halo.run import StageFolder, atomic_folder, claim, recorded_config
from halo.tables import config_table
from halo.training.engine import complete_ds_config, read_ds_config
from halo.training.objectives import NextToken
from halo.training.trainer import train

TEACHER = "teacher"
TEMPLATE_COPIES = 200
"""How often the needle's wording is in the tokenizer's training text: enough for its words to be single tokens."""


def run(job: Job) -> Path:
    """Pretrain, unless it is done; returns the teacher's folder."""
    training = job.config.pretrain
    if training is None:
        raise UserError(f"preset '{job.config.name}' has no [pretrain] table")
    made_from = {k: v for k, v in config_table(training).items() if k not in FREE}
    folder = StageFolder(job.run / "pretrain", made_from)

    def check() -> dict[str, Any]:
        ds_config = read_ds_config(job.ds_config)
        complete_ds_config(ds_config, training)
        claim(job.run, job.config)
        return ds_config

    def prepare() -> tuple[bool, Path, str | Path]:
        tokenizer = _tokenizer(training, folder.path / "tokenizer")
        shards = ensure_shards(training, "pretrain", job.run / "data" / "pretrain", load_tokenizer(tokenizer))
        return folder.is_complete(), tokenizer, shards

    ds_config = on_rank0(check)
    with recorded_config(job.run, job.config):
        done, tokenizer, shards = on_rank0(prepare)
        if not done:
            torch.manual_seed(training.seed)
            model = Qwen3ForCausalLM(model_config(training, load_tokenizer(tokenizer)))
            result = train(NextToken(model), training, shards=shards, folder=folder, ds_config=ds_config)
            on_rank0(lambda: _save(folder, model, result.weights, tokenizer, result.summary()))
    return folder.path / TEACHER


def model_config(training: Pretrain, tokenizer: PreTrainedTokenizerBase | None = None) -> Qwen3Config:
    """A Qwen3 of the preset's shape, with tied embeddings; its special tokens are the tokenizer's."""
    return Qwen3Config(
        vocab_size=training.vocab_size,
        hidden_size=training.hidden_size,
        intermediate_size=training.ffn,
        num_hidden_layers=training.layers,
        num_attention_heads=training.heads,
        num_key_value_heads=training.kv_heads,
        head_dim=training.head_dim,
        max_position_embeddings=training.seq_len,
        rope_theta=training.rope_theta,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id if tokenizer else None,
        pad_token_id=tokenizer.pad_token_id if tokenizer else None,
    )


def _tokenizer(training: Pretrain, folder: Path) -> Path:
    """Train the tokenizer on the corpus and on the needle's wording, once."""
    if not folder.is_dir():
        texts = itertools.chain(read_documents(training.corpus.source, "train"), template_texts(TEMPLATE_COPIES))
        with atomic_folder(folder) as partial:
            train_tokenizer(texts, training.vocab_size).save_pretrained(partial)
    if len(load_tokenizer(folder)) != training.vocab_size:
        raise UserError(f"{folder} has another vocab_size than {training.vocab_size}: remove it to train it again")
    return folder


def _save(
    folder: StageFolder, model: Qwen3ForCausalLM, weights: dict[str, Tensor], tokenizer: Path, summary: dict[str, Any]
) -> None:
    """Write the teacher in bfloat16, in one step."""
    with atomic_folder(folder.path / TEACHER) as partial:
        model.to(torch.bfloat16).save_pretrained(
            partial, state_dict={name.removeprefix("student."): w.to(torch.bfloat16) for name, w in weights.items()}
        )
        load_tokenizer(tokenizer).save_pretrained(partial)
    folder.complete(folder.files_in(TEACHER), summary)
