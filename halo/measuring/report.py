"""The results of a conversion: recall over length (Table 2), CSR, the cost of each stage, selection and scaling.

Pure functions from results to Markdown, JSON and PNG. The caller writes the files.
"""

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from halo.measuring.scales import Scales

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TASKS = {
    "niah_single_1": "a number in noise",
    "niah_single_2": "a number in prose",
    "niah_single_3": "a UUID in prose",
}

# Okabe and Ito's colours, which colour-blind readers can tell apart. Markers and dashes differ too.
LINES = [("#000000", "o", "-"), ("#E69F00", "s", "--"), ("#56B4E9", "^", "-."), ("#D55E00", "D", "-")]

RECALL = "needle recall, %"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The needle recall of every model on the same samples, for one variant at one length."""

    variant: str
    length: int
    """Tokens in a sample, including the answer."""
    samples: int
    recall: dict[str, float]
    """Model name to recall in [0, 1], in the order of the table's rows."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """The cost of one stage of the conversion."""

    name: str
    tokens: int
    parameters: int
    """Trained parameters; 0 if the stage trains nothing."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Results:
    """The content of a report.

    Raises:
        ValueError: there are no cells, or they have different models.
    """

    training_length: int
    """The context length of the teacher's training, in tokens."""
    cells: Sequence[Cell]
    stages: Sequence[StageCost]

    def __post_init__(self) -> None:
        if not self.cells:
            raise ValueError("a report needs at least one cell of results")
        for cell in self.cells:
            if list(cell.recall) != self.models:
                raise ValueError(f"{cell.variant} at {cell.length} has models {list(cell.recall)}, not {self.models}")

    @property
    def models(self) -> list[str]:
        return list(self.cells[0].recall)

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(cell.variant for cell in self.cells))

    def of(self, variant: str) -> list[Cell]:
        """The cells of one variant, shortest length first."""
        return sorted((cell for cell in self.cells if cell.variant == variant), key=lambda cell: cell.length)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a model in one CSR task."""

    metric: str
    value: float
    """In [0, 1]."""
    samples: int


def to_json(results: Results) -> str:
    """Everything in `results`, unrounded."""
    return json.dumps(asdict(results), indent=2) + "\n"


def to_markdown(results: Results) -> str:
    """The table of recall (a row for each model, a column for each variant and length), and the table of stages."""
    columns = [cell for variant in results.variants for cell in results.of(variant)]
    header = ["Recall, %"]
    for variant in results.variants:
        multiples = [f"{cell.length / results.training_length:g}x" for cell in results.of(variant)]
        header += [f"{_title(variant)}, {multiples[0]}", *multiples[1:]]
    recall = [
        header,
        ["*tokens*", *(f"{cell.length:,}" for cell in columns)],
        *([model, *(_percent(cell.recall[model]) for cell in columns)] for model in results.models),
        ["*samples*", *(str(cell.samples) for cell in columns)],
    ]
    stages = [
        ["Stage", "Tokens", "Trained parameters", "Seconds"],
        *([s.name, f"{s.tokens:,}", f"{s.parameters:,}", f"{s.seconds:,.0f}"] for s in results.stages),
        ["**all**", f"{sum(s.tokens for s in results.stages):,}", "", f"{sum(s.seconds for s in results.stages):,.0f}"],
    ]
    return f"{_table(recall)}\n{_table(stages)}"


def to_png(results: Results) -> bytes:
    """Recall over length: a panel for each variant, a line for each model. Made for a width of 900 pixels."""
    figure = _figure(9, 3.4)
    panels = figure.subplots(1, len(results.variants), sharey=True, squeeze=False)[0]
    for panel, variant in zip(panels, results.variants, strict=True):
        _draw(panel, results, variant)
    panels[0].set_ylabel("exact-match recall, %")
    figure.supxlabel("context length, tokens", fontsize=10)
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(
        lines, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9, columnspacing=1.4
    )
    return _png(figure)


def csr_average(scores: Mapping[str, Score]) -> float:
    """The paper's CSR: the mean over tasks, all with equal weight, in [0, 1]."""
    return sum(score.value for score in scores.values()) / len(scores)


def csr_markdown(scores: Mapping[str, Mapping[str, Score]]) -> str:
    """The table of CSR: a row for each model, a column for each task.

    Args:
        scores: model to task to score; all models have the same tasks.
    """
    tasks = next(iter(scores.values()))
    return _table(
        [
            ["CSR, %", *tasks, "**average**"],
            *(
                [model, *(_percent(score.value) for score in of.values()), _percent(csr_average(of))]
                for model, of in scores.items()
            ),
            ["*metric*", *(score.metric for score in tasks.values()), ""],
            ["*samples*", *(f"{score.samples:,}" for score in tasks.values()), ""],
        ]
    )


def selection_png(recall: Sequence[float], csr: Sequence[float], kept: Sequence[int]) -> bytes:
    """Recall and CSR of the teacher with one layer replaced, for each layer, and the layers that stay attention.

    Args:
        recall, csr: in [0, 1], for each replaced layer.
        kept: the layers that stay attention.
    """
    figure = _figure(9, 3)
    panel = figure.subplots()
    for number, layer in enumerate(kept):
        panel.axvspan(layer - 0.4, layer + 0.4, color="0.88", label="stays attention" if number == 0 else None)
    for scores, label, (color, marker, linestyle) in [(recall, "recall", LINES[3]), (csr, "CSR", LINES[2])]:
        panel.plot(
            [100 * score for score in scores],
            color=color,
            marker=marker,
            linestyle=linestyle,
            label=label,
            clip_on=False,
        )
    panel.set_xticks(range(len(recall)))
    panel.tick_params(axis="x", labelsize=8)
    panel.set_xlabel("the one layer replaced by an RNN")
    panel.set_ylabel("score, %")
    _tidy(panel)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return _png(figure)


def scaling_markdown(scales: Scales) -> str:
    """The table of the choice of the scaling: a row for each candidate, the chosen one in bold."""
    recall = scales.lengths if scales.candidates[0].recall else []
    header = ["Scaling", *(f"recall, {_short(n)}, %" for n in recall), *(f"loss, {_short(n)}" for n in scales.lengths)]
    rows = [[*header, *(["recall, %"] if recall else []), "loss"]]
    for candidate in scales.candidates:
        figures = [_percent(candidate.recall_at(length)) for length in recall]
        figures += [f"{candidate.loss[length]:.4f}" for length in scales.lengths]
        figures += [*([_percent(candidate.mean_recall)] if recall else []), f"{candidate.mean_loss:.4f}"]
        row = [candidate.name, *figures]
        rows.append([f"**{cell}**" for cell in row] if candidate is scales.chosen else row)
    return _table(rows)


def scaling_png(scales: Scales) -> bytes:
    """Recall and loss over the candidates, a line for each length. The chosen one is marked."""
    figure = _figure(9, 3.2)
    recall = [(RECALL, lambda c, n: 100 * c.recall_at(n))] if scales.candidates[0].recall else []
    drawn = [*recall, ("loss, nats", lambda c, n: c.loss[n])]
    names = [candidate.name for candidate in scales.candidates]
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for panel, (label, value) in zip(panels, drawn, strict=True):
        chosen = names.index(scales.chosen.name)
        panel.axvspan(chosen - 0.3, chosen + 0.3, color="0.88", label="chosen")
        for length, (color, marker, linestyle) in zip(scales.lengths, itertools.cycle(LINES), strict=False):
            values = [value(candidate, length) for candidate in scales.candidates]
            panel.plot(values, color=color, marker=marker, linestyle=linestyle, label=f"{_short(length)} tokens")
        panel.set_xticks(range(len(names)), names)
        panel.tick_params(axis="x", labelsize=8)
        panel.set_xlabel("scaling of the attention logits")
        panel.set_ylabel(label)
        _tidy(panel, percent=label == RECALL)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=9
    )
    return _png(figure)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # imported only here: most commands draw nothing

    return Figure(figsize=(width, height), layout="constrained")


def _draw(panel: "Axes", results: Results, variant: str) -> None:
    cells = results.of(variant)
    lengths = [cell.length for cell in cells]
    for model, (color, marker, linestyle) in zip(results.models, itertools.cycle(LINES), strict=False):
        recall = [100 * cell.recall[model] for cell in cells]
        panel.plot(lengths, recall, color=color, marker=marker, linestyle=linestyle, label=model, clip_on=False)
    panel.axvline(
        results.training_length, color="0.5", linestyle="--", linewidth=1, label="teacher's training length", zorder=1
    )
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [_short(length) for length in lengths])
    panel.set_title(_title(variant) + (f"\n{TASKS[variant]}" if variant in TASKS else ""), fontsize=10)
    _tidy(panel)


def _tidy(panel: "Axes", percent: bool = True) -> None:
    if percent:
        panel.set_ylim(-3, 103)
    panel.grid(color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _png(figure: "Figure") -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    return png.getvalue()


def _title(variant: str) -> str:
    """RULER's name of a variant: NIAH-Single-1."""
    return variant.replace("niah_single_", "NIAH-Single-")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. The first row is the header; every column but the first is aligned right."""
    rules = [":--", *["--:"] * (len(rows[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rules, *rows[1:]])
