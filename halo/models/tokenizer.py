"""Tokenizers: train a small one like Qwen's, load one, compare two."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from halo.errors import UserError, first_line
from halo.models.folders import fetch_small_files
from halo.models.gguf import is_gguf, mend_tokenizer, where
from halo.models.tokenizer_files import read_tokenizer

EOS = "<|endoftext|>"

# Where Qwen's tokenizers cut before BPE: contractions, words with the one character before them, single digits,
# punctuation, line ends, spaces.
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `vocab_size` tokens. The end-of-text token is the last, and pads as well.

    Raises:
        UserError: `texts` are too short for `vocab_size` tokens, or it is less than the number of bytes.
    """
    bytes_alone = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(bytes_alone):
        raise UserError(f"a vocabulary of {vocab_size} cannot hold {len(bytes_alone)} bytes and {EOS}")
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=bytes_alone, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    if len(tokenizer) != vocab_size:
        raise UserError(f"the text gives a vocabulary of {len(tokenizer)} tokens, {vocab_size} were asked for")
    return tokenizer


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, in a GGUF file, or under a name on the Hugging Face hub.

    Raises:
        UserError: as `fetch_small_files` and `read_tokenizer`; or it has no end-of-text token.
    """
    tokenizer = _read_gguf(source) if is_gguf(source) else read_tokenizer(fetch_small_files(str(source)))
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer at {source} has no end-of-text token (eos_token)")
    return tokenizer


def _read_gguf(file: str | Path) -> PreTrainedTokenizerFast:
    try:
        config = AutoConfig.from_pretrained(**where(file))
        tokenizer = AutoTokenizer.from_pretrained(**where(file), config=config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the tokenizer in {file} cannot be read: {first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer in {file} is none of the kinds that can be used: take the model's folder")
    mend_tokenizer(tokenizer, config)
    return tokenizer


def encode_parts(tokenizer: PreTrainedTokenizerFast, texts: Iterable[Sequence[str]]) -> list[list[list[int]]]:
    """Texts, each given in parts, encoded as wholes without special tokens: the ids of each part of each text.

    A part encoded alone may have other ids: SentencePiece's tokenizers begin each text with a space. A token that two
    parts share belongs to the later one.
    """
    texts = [list(parts) for parts in texts]
    encoded = tokenizer(["".join(parts) for parts in texts], add_special_tokens=False, return_offsets_mapping=True)
    split = []
    for parts, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # By the tokens' ends: byte-level tokenizers leave spaces out of the offsets at which tokens begin.
        of_part = np.searchsorted(np.cumsum([len(part) for part in parts]), [end for _, end in offsets])
        split.append([np.asarray(ids)[of_part == part].tolist() for part in range(len(parts))])
    return split


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between documents: <|endoftext|> if there is one (Qwen's chat models end a turn with another)."""
    return tokenizer.get_vocab().get(EOS, tokenizer.eos_token_id)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that an export takes over: also of special tokens and the chat template."""
    whole = [tokenizer_hash(tokenizer), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides the ids of a text; the same before and after saving."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # of the last call, not of the tokenizer
        del content[setting]
    content["eos"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
