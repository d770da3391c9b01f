"""The choice of the scaling: recall decides where it can, then the loss; and what the report shows of it."""

from dataclasses import replace

import pytest

from halo.measuring.report import scaling_markdown, scaling_png
from halo.measuring.scales import Candidate, Scales


def candidate(name: str, loss: float, *recall: float) -> Candidate:
    """The same loss at both lengths, and the recall of two variants at each."""
    spec = None if name == "none" else f"hype {name}"
    lengths = dict(zip((1024, 8192), ((recall[0], recall[1]), (recall[2], recall[3])), strict=True)) if recall else {}
    of_lengths = {n: {"niah_single_1": one, "niah_single_2": two} for n, (one, two) in lengths.items()}
    return Candidate(name=name, attn_logits_scaling=spec, loss={1024: loss, 8192: loss + 0.5}, recall=of_lengths)


def scales(*candidates: Candidate, needles: int = 25, allow_none: bool = True) -> Scales:
    documents = {1024: (8, 8), 8192: (8, 3)}
    return Scales(candidates=candidates, needles=needles, documents=documents, allow_none=allow_none)


NONE = candidate("none", 2.0, 1, 1, 0.2, 0)
LOW, HIGH = candidate("128", 2.2, 1, 1, 0.9, 0.8), candidate("512", 2.1, 1, 1, 0.92, 0.7)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (scales(NONE, LOW, HIGH), "512"),  # recall .925 and .905 of 100 samples are not told apart: less loss
        (scales(NONE, LOW, HIGH, needles=2500), "128"),  # of 10,000 samples they are
        (scales(NONE, candidate("128", 2.2, 1, 1, 0.2, 0)), "none"),  # as much recall, less loss
        (scales(NONE, candidate("128", 2.2, 1, 1, 0.2, 0), allow_none=False), "128"),
        (scales(NONE, LOW, HIGH, needles=1), "512"),  # four samples each
        (scales(candidate("none", 2.0), candidate("128", 1.9), candidate("512", 1.95), needles=0), "128"),
        (scales(candidate("none", 1.0, 0, 0, 0, 0), candidate("128", 0.9, 0, 0, 0, 0)), "128"),  # nothing is recalled
    ],
    ids=["loss", "recall", "none wins", "none may not", "few samples", "no needles", "no recall"],
)
def test_the_choice(given: Scales, chosen: str) -> None:
    assert given.chosen.name == chosen
    assert given.to_json()["attn_logits_scaling"] == (None if chosen == "none" else f"hype {chosen}")


def test_one_wrong_answer_of_a_hundred_is_within_the_error() -> None:
    """The best has none; a plain binomial error of it would be 0."""
    assert scales(candidate("none", 2.0, 1, 1, 1, 0.96), candidate("128", 2.1, 1, 1, 1, 1)).chosen.name == "none"
    assert scales(candidate("none", 2.0, 1, 1, 1, 0.9), candidate("128", 2.1, 1, 1, 1, 1)).chosen.name == "128"


def test_the_json_has_the_whole_curve() -> None:
    found = scales(NONE, LOW, HIGH).to_json()
    assert [c["name"] for c in found["candidates"]] == ["none", "128", "512"]
    assert found["candidates"][1]["recall"][8192] == {"niah_single_1": 0.9, "niah_single_2": 0.8}
    assert found["candidates"][1]["mean_recall"] == pytest.approx(0.925)
    assert found["candidates"][1]["mean_loss"] == pytest.approx(2.45)
    assert found["documents"][8192] == {"windows": 8, "within_one": 3}
    assert 0.02 < found["standard_error"] < 0.03


def test_the_table_and_the_plot() -> None:
    assert scaling_markdown(scales(NONE, LOW, HIGH)) == (
        "| Scaling | recall, 1K, % | recall, 8K, % | loss, 1K | loss, 8K | recall, % | loss |\n"
        "| :-- | --: | --: | --: | --: | --: | --: |\n"
        "| none | 100 | 10 | 2.0000 | 2.5000 | 55 | 2.2500 |\n"
        "| 128 | 100 | 85 | 2.2000 | 2.7000 | 92.5 | 2.4500 |\n"
        "| **512** | **100** | **81** | **2.1000** | **2.6000** | **90.5** | **2.3500** |\n"
    )
    without = scales(*(replace(c, recall={}) for c in (NONE, LOW)), needles=0)
    assert scaling_markdown(without).startswith("| Scaling | loss, 1K | loss, 8K | loss |\n")
    for given in (scales(NONE, LOW, HIGH), without):
        assert scaling_png(given).startswith(b"\x89PNG")
