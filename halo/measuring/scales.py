"""How a hybrid does with each scaling of its attention logits (Eq. 11), and which of them it should have.

The paper chooses the base a by loss on pre-training documents. But the scaling is there for recall at long context
(Figure 8), of which the loss says little. So recall decides as far as its samples tell candidates apart, and the loss
among those that they do not: the one-standard-error rule.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One scaling, and what was measured with it. All candidates are measured on the same text."""

    name: str
    """The base or the constant, or "none"."""
    attn_logits_scaling: str | float | None
    """As HypeNetConfig has it."""
    loss: dict[int, float]
    """Length in tokens -> mean next-token loss, in nats."""
    recall: dict[int, dict[str, float]]
    """Length -> variant -> needle recall in [0, 1]. Empty: not measured."""

    @property
    def mean_loss(self) -> float:
        """Over the lengths, all with equal weight."""
        return sum(self.loss.values()) / len(self.loss)

    def recall_at(self, length: int) -> float:
        """Over the variants."""
        return sum(self.recall[length].values()) / len(self.recall[length])

    @property
    def mean_recall(self) -> float:
        """Over lengths and variants; 0 if it was not measured."""
        return sum(map(self.recall_at, self.recall)) / len(self.recall) if self.recall else 0.0


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The whole curve, and the choice.

    Attributes:
        candidates: the first is "none".
        needles: samples of a variant at a length.
        documents: length -> windows of text, and how many of these lie within one document.
        allow_none: whether "none" may be chosen.
    """

    candidates: Sequence[Candidate]
    needles: int
    documents: dict[int, tuple[int, int]]
    allow_none: bool

    @property
    def lengths(self) -> list[int]:
        return sorted(self.candidates[0].loss)

    @property
    def _eligible(self) -> Sequence[Candidate]:
        return self.candidates if self.allow_none else self.candidates[1:]

    @property
    def standard_error(self) -> float:
        """Of the best mean recall, over all its samples, as Agresti and Coull have it: with two right and two wrong
        answers more, so that it is not 0 where all are right, or none."""
        samples = self.needles * sum(map(len, self.candidates[0].recall.values()))
        if not samples:
            return 0.0
        best = max(candidate.mean_recall for candidate in self._eligible)
        share = (best * samples + 2) / (samples + 4)
        return math.sqrt(share * (1 - share) / samples)

    @property
    def chosen(self) -> Candidate:
        """The least loss, of all whose recall is at most a standard error below the best."""
        least = max(candidate.mean_recall for candidate in self._eligible) - self.standard_error
        return min((c for c in self._eligible if c.mean_recall >= least), key=lambda c: c.mean_loss)

    def to_json(self) -> dict[str, Any]:
        """The choice, and everything that it rests on, unrounded."""
        means = [{"mean_recall": c.mean_recall, "mean_loss": c.mean_loss} for c in self.candidates]
        return {
            "attn_logits_scaling": self.chosen.attn_logits_scaling,
            "chosen": self.chosen.name,
            "standard_error": self.standard_error,
            "needles": self.needles,
            "documents": {n: {"windows": all_, "within_one": one} for n, (all_, one) in self.documents.items()},
            "candidates": [asdict(c) | mean for c, mean in zip(self.candidates, means, strict=True)],
        }
