"""The trained tokenizer is lossless and of the size asked for; its hash names it."""

from itertools import chain
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from halo.data.corpus import read_documents
from halo.errors import UserError
from halo.models.tokenizer import EOS, encode_parts, load_tokenizer, tokenizer_hash, train_tokenizer
from tests.halo.tokenizer_kinds import KINDS


@pytest.mark.parametrize("text", ["Plain words.", " £20,000 and\n\n\ttabs  twice", "naïve 漢字 🙂", "is: 123.\nThe"])
def test_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize(" 20567") == ["Ġ", "2", "0", "5", "6", "7"]


def test_size_and_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 1024
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (EOS, 1023)
    assert max(tokenizer("text of no end")["input_ids"]) < 1023


def test_training_is_deterministic_and_hash_names_it(
    tokenizer: PreTrainedTokenizerFast, corpus: Path, tmp_path: Path
) -> None:
    emma = list(read_documents(corpus / "emma.txt", "train"))
    first, second = train_tokenizer(emma, 400), train_tokenizer(emma, 400)
    assert tokenizer_hash(first) == tokenizer_hash(second)
    assert tokenizer_hash(first) != tokenizer_hash(tokenizer)
    first.save_pretrained(tmp_path)
    first(["some", "padded text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(first)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_hash(first)


def test_too_little_text() -> None:
    with pytest.raises(UserError, match="500 were asked for"):
        train_tokenizer(["ab ab"], 500)


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(UserError, match="cannot hold 256 bytes"):
        train_tokenizer(["text"], 256)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path)


def test_no_end_of_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_text_have_the_ids_of_the_text(corpus: Path, kind: str) -> None:
    made = KINDS[kind](list(read_documents(corpus / "emma.txt", "train"))[:2])
    texts = [
        ["It is", " late.", " So"],
        ["a", "", "\n\nb", "  c  ", "naïve 漢字 🙂"],
        [" two", "  spaces  ", "x"],
        ["one"],
    ]
    for parts, ids in zip(texts, encode_parts(made, texts), strict=True):
        assert len(ids) == len(parts)
        assert [*chain(*ids)] == made("".join(parts), add_special_tokens=False)["input_ids"]
    [(before, after, last)] = encode_parts(made, [("It is", " late.", " So")])
    assert made.decode(before + after).endswith("is late.")
    assert made.decode(before).endswith("is") and made.decode(last).strip() == "So"


def test_a_token_that_two_parts_share_belongs_to_the_later(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tokenizer(" the")["input_ids"]
    assert len(whole) == 1
    assert encode_parts(tokenizer, [(" t", "he")]) == [[[], whole]]
