"""Training a small Transformer from scratch: how the embedded teacher was made.

Writes `teacher/`: a Hugging Face folder, its tokenizer trained on the same text.
"""

import itertools
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from halo.config import Pretrain
from halo.context import Context
from halo.data.corpus import read_documents
from halo.data.needle import template_texts
from halo.data.stage_shards import ensure_shards
from halo.distributed import on_rank0
from halo.errors import UserError
from halo.models.attention_functions import use_attention
from halo.models.tokenizer import load_tokenizer, train_tokenizer
from halo.run import StageFolder, atomic_folder
from halo.training.objectives import NextToken
from halo.training.trainer import Result, train

TEACHER_FOLDER = "teacher"
TEMPLATE_COPIES = 200
"""How often the tokenizer's training text holds the needle's wording: enough for its words to become single tokens."""


def run(context: Context) -> None:
    folder, training = context.folder("pretrain"), context.config.pretrain
    assert training is not None  # the pipeline has checked
    tokenizer = folder.path / "tokenizer"
    shards = on_rank0(_prepare_text, training, tokenizer, context.run / "data" / "pretrain")
    torch.manual_seed(training.seed)
    model = Qwen3ForCausalLM(model_config(training, load_tokenizer(tokenizer)))
    use_attention(model, context.attention["pretrain"]["student"])
    result = train(NextToken(model), training, shards=shards, folder=folder, ds_config=context.ds_config)
    on_rank0(_save_teacher, folder, model, result, tokenizer)


def _prepare_text(training: Pretrain, tokenizer: Path, shards: Path) -> str | Path:
    """The tokenizer, trained into its folder, and the shards that are made with it."""
    _train_tokenizer(training, tokenizer)
    return ensure_shards(training, "pretrain", shards, load_tokenizer(tokenizer))


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


def _train_tokenizer(training: Pretrain, folder: Path) -> None:
    """Train the tokenizer on the corpus and on the needle's wording, unless it is there.

    Raises:
        UserError: it is there, with another vocabulary.
    """
    if not folder.is_dir():
        texts = itertools.chain(read_documents(training.corpus.source, "train"), template_texts(TEMPLATE_COPIES))
        with atomic_folder(folder) as partial:
            train_tokenizer(texts, training.vocab_size).save_pretrained(partial)
    if len(load_tokenizer(folder)) != training.vocab_size:
        raise UserError(f"{folder} has another vocab_size than {training.vocab_size}: remove it to train it again")


def _save_teacher(folder: StageFolder, model: Qwen3ForCausalLM, result: Result, tokenizer: Path) -> None:
    """Write the teacher in bfloat16, in one step, and complete the stage."""
    weights = {name.removeprefix("student."): w.to(torch.bfloat16) for name, w in result.weights.items()}
    with atomic_folder(folder.path / TEACHER_FOLDER) as partial:
        model.to(torch.bfloat16).save_pretrained(partial, state_dict=weights)
        load_tokenizer(tokenizer).save_pretrained(partial)
    folder.complete(folder.files_in(TEACHER_FOLDER), result.summary())
