"""The data of the task beside this file."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from halo.data.held_out import HeldOut
from halo.measuring.evaluation import build_questions
from halo.models.tokenizer import load_tokenizer

TINY = Path(__file__).parents[1]


def questions(**_: Any) -> dict[str, Dataset]:
    """As layer selection asks them, in words."""
    tokenizer = load_tokenizer(TINY / "teacher")
    documents = HeldOut(str(TINY / "corpus"), tokenizer).token_ids()
    asked = build_questions(documents, count=200, context=128, continuation=32, seed=7)
    rows = [
        {
            "context": tokenizer.decode(question.context),
            "choices": [tokenizer.decode(choice) for choice in question.choices],
            "answer": question.answer,
        }
        for question in asked
    ]
    return {"test": Dataset.from_list(rows)}
