"""What a reader finds in the Markdown, the JSON and the picture."""

import json
import struct

import pytest

from halo.measuring.report import Cell, Results, StageCost, selection_png, to_json, to_markdown, to_png

RESULTS = Results(
    training_length=256,
    cells=[
        Cell(variant="niah_single_1", length=1024, samples=50, recall={"teacher": 0.0, "hybrid": 1.0}),
        Cell(variant="niah_single_1", length=256, samples=200, recall={"teacher": 0.996, "hybrid": 0.985}),
        Cell(variant="niah_single_2", length=256, samples=200, recall={"teacher": 1.0, "hybrid": 0.9}),
    ],
    stages=[
        StageCost(name="align", tokens=819_200, parameters=1_234_567, seconds=61.7),
        StageCost(name="selection", tokens=100_000, parameters=0, seconds=1030.2),
    ],
)


def test_markdown() -> None:
    assert to_markdown(RESULTS) == (
        "| Recall, % | NIAH-Single-1, 1x | 4x | NIAH-Single-2, 1x |\n"
        "| :-- | --: | --: | --: |\n"
        "| *tokens* | 256 | 1,024 | 256 |\n"
        "| teacher | 99.6 | 0 | 100 |\n"
        "| hybrid | 98.5 | 100 | 90 |\n"
        "| *samples* | 200 | 50 | 200 |\n"
        "\n"
        "| Stage | Tokens | Trained parameters | Seconds |\n"
        "| :-- | --: | --: | --: |\n"
        "| align | 819,200 | 1,234,567 | 62 |\n"
        "| selection | 100,000 | 0 | 1,030 |\n"
        "| **all** | 919,200 |  | 1,092 |\n"
    )


def test_json_holds_everything() -> None:
    read = json.loads(to_json(RESULTS))
    assert (
        Results(
            training_length=read["training_length"],
            cells=[Cell(**cell) for cell in read["cells"]],
            stages=[StageCost(**stage) for stage in read["stages"]],
        )
        == RESULTS
    )


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


def test_png_is_twice_the_width_that_it_is_shown_at() -> None:
    png = to_png(RESULTS)
    assert size(png) == (1800, 680)
    assert png == to_png(RESULTS)


def test_selection_png_shows_what_is_kept() -> None:
    recall, csr = [0.1, 0.9, 0.5, 1.0], [0.5, 0.4, 0.6, 0.5]
    assert size(selection_png(recall, csr, [0])) == (1800, 600)
    assert selection_png(recall, csr, [0]) != selection_png(recall, csr, [1])


def test_cells_must_agree_on_the_models() -> None:
    other = Cell(variant="niah_single_3", length=512, samples=1, recall={"hybrid": 1.0, "teacher": 0.0})
    with pytest.raises(ValueError, match="niah_single_3 at 512 has models"):
        Results(training_length=256, cells=[*RESULTS.cells, other], stages=[])
    with pytest.raises(ValueError, match="at least one cell"):
        Results(training_length=256, cells=[], stages=[])
