"""Small tokenizers of the kinds that teachers have, trained on the embedded corpus."""

import json
from collections.abc import Callable, Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_BYTES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _byte_level(texts: Iterable[str], pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def gpt2(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    return _fast(_byte_level(texts, pre_tokenizers.ByteLevel(add_prefix_space=False)))


def gpt2_with_a_space_before(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """As RoBERTa's kind: each text begins with a space, if it does not already."""
    return _fast(_byte_level(texts, pre_tokenizers.ByteLevel(add_prefix_space=True)))


def llama3(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    cuts = pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _fast(_byte_level(texts, pre_tokenizers.Sequence([cuts, level])))


def _sentencepiece_bpe(texts: Iterable[str]) -> Tokenizer:
    """SentencePiece's BPE with bytes for unknown characters, trained word by word, and with a token of two spaces."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)]
    )
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=_BYTES, show_progress=False)
    made.train_from_iterator((text.replace("\n", " ") for text in texts), trainer)
    model = json.loads(made.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    vocab[SPACE * 2] = len(vocab)
    made.model = models.BPE(
        vocab=vocab, merges=[(SPACE, SPACE), *merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def llama2(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """`legacy`: a space is put before the text by a normalizer, and the text is not cut into words."""
    made = _sentencepiece_bpe(texts)
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    return _fast(made)


def mistral(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Version 1: a space is put before the text's first word alone."""
    made = _sentencepiece_bpe(texts)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _fast(made)


def no_prefix(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """`add_prefix_space=False`."""
    made = _sentencepiece_bpe(texts)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return _fast(made)


def unigram(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram, as T5 and XLNet have it."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return _fast(made)


KINDS: dict[str, Callable[[Iterable[str]], PreTrainedTokenizerFast]] = {
    kind.__name__: kind for kind in (gpt2, gpt2_with_a_space_before, llama3, llama2, mistral, no_prefix, unigram)
}
