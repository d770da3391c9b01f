"""The embedded corpus and a tokenizer like the embedded teacher's."""

from itertools import chain
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import halo
from halo.data.corpus import read_documents
from halo.data.needle import template_texts
from halo.models.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def corpus() -> Path:
    return Path(halo.__file__).parent / "presets" / "tiny" / "corpus"


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    return train_tokenizer(chain(read_documents(corpus, "train"), template_texts(1000)), 1024)
