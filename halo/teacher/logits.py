"""The forms in which a teacher supplies its logits to the loss (halo/losses/linear_kl.py).

    factored   final hidden states and the frozen head: exact, and E numbers a token (the default)
    full       the logits themselves, rounded to the training precision: V numbers a token
    top_k      the k largest, and one sum over all others: 2 k + 2 numbers a token; the KL is then a lower bound

Shapes: N tokens, V words of the vocabulary, E teacher width, k largest logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hypenet.losses import exact_logits

TOP_K_ROWS = 256
"""The k largest logits are found for this many tokens at a time."""

LogitsKind = Literal["factored", "full", "top_k"]


@dataclass(frozen=True)
class FactoredLogits:
    """Logits as `hidden @ head.T`: [N, E] final hidden states and the [V, E] head, both without gradient."""

    hidden: Tensor
    head: Tensor

    @property
    def words(self) -> int:
        return len(self.head)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that differ from token to token, [N, ...] each."""
        return (self.hidden,)

    def with_parts(self, parts: Sequence[Tensor]) -> "FactoredLogits":
        """The same with other `parts`."""
        (hidden,) = parts
        return FactoredLogits(hidden, self.head)

    def rows(self, begin: int, end: int, out: Tensor) -> Tensor:
        """Write the logits of tokens `begin` to `end` into `out`, [end - begin, W]: those of the first W words."""
        return exact_logits(self.hidden[begin:end], self.head[: out.shape[1]], out)


@dataclass(frozen=True)
class FullLogits:
    """[N, V] logits, without gradient."""

    values: Tensor

    @property
    def words(self) -> int:
        return self.values.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def with_parts(self, parts: Sequence[Tensor]) -> "FullLogits":
        """As `FactoredLogits.with_parts`."""
        (values,) = parts
        return FullLogits(values)

    def rows(self, begin: int, end: int, out: Tensor) -> Tensor:
        """As `FactoredLogits.rows`."""
        return out.copy_(self.values[begin:end, : out.shape[1]])


@dataclass(frozen=True)
class TopKLogits:
    """The k largest logits of each token, and what a KL needs that counts all other words as one.

    Attributes:
        values: [N, k] float32, the largest first.
        indices: [N, k] int32, their words.
        log_rest: [N] float32, log sum exp(t / T) over the other words; minus infinity if there are none.
        entropy: [N] float32, of the whole distribution at T, in nats.
        temperature: T.
        words: how many words were compared: those that teacher and student both have.
    """

    values: Tensor
    indices: Tensor
    log_rest: Tensor
    entropy: Tensor
    temperature: float
    words: int

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.values, self.indices, self.log_rest, self.entropy

    def with_parts(self, parts: Sequence[Tensor]) -> "TopKLogits":
        """As `FactoredLogits.with_parts`."""
        values, indices, log_rest, entropy = parts
        return TopKLogits(values, indices, log_rest, entropy, self.temperature, self.words)

    def part(self, begin: int, end: int) -> "TopKLogits":
        """The same of tokens `begin` to `end`."""
        return self.with_parts([x[begin:end] for x in self.parts])


TeacherLogits = FactoredLogits | FullLogits | TopKLogits


@dataclass(frozen=True, kw_only=True)
class LogitsForm:
    """The form in which a teacher supplies its logits.

    Attributes:
        words: `full` and `top_k` have the logits of this many first words: those that the student has too.
        top_k, temperature: k and T of `top_k`.
    """

    kind: LogitsKind = "factored"
    words: int = 0
    top_k: int = 0
    temperature: float = 1.0

    def supply(self, hidden: Tensor, head: Tensor) -> TeacherLogits:
        """hidden [N, E] and the head [V, E], both without gradient -> the logits in this form."""
        if self.kind == "factored":
            return FactoredLogits(hidden, head)
        if self.kind == "full":
            return FullLogits(hidden @ head[: self.words].T)
        rows = [self._largest(part, head[: self.words]) for part in hidden.split(TOP_K_ROWS)]
        return self.assemble([torch.cat(column) for column in zip(*rows, strict=True)])

    def _largest(self, hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        """hidden [n, E] -> the `parts` of TopKLogits."""
        logits = exact_logits(hidden, head)
        values, indices = logits.topk(self.top_k)
        logits /= self.temperature
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        log_rest = logits.scatter_(-1, indices, -torch.inf).logsumexp(-1)
        return values, indices.int(), log_rest, entropy

    def empty(self, tokens: int, like: Tensor) -> list[Tensor]:
        """Uninitialised `parts` of the logits of N = `tokens` tokens.

        Args:
            like: has the width, the dtype and the device of the teacher's head, [any, E].
        """
        if self.kind == "factored":
            return [like.new_empty(tokens, like.shape[1])]
        if self.kind == "full":
            return [like.new_empty(tokens, self.words)]
        wide = torch.promote_types(like.dtype, torch.float32)
        largest = like.new_empty(tokens, self.top_k, dtype=wide)
        rest = [like.new_empty(tokens, dtype=wide) for _ in range(2)]
        return [largest, torch.empty_like(largest, dtype=torch.int32), *rest]

    def assemble(self, parts: Sequence[Tensor], head: Tensor | None = None) -> TeacherLogits:
        """The logits that have these `parts`; the factored form needs the teacher's head, [V, E], too."""
        if self.kind == "factored":
            (hidden,) = parts
            assert head is not None
            return FactoredLogits(hidden, head)
        if self.kind == "full":
            (values,) = parts
            return FullLogits(values)
        values, indices, log_rest, entropy = parts
        return TopKLogits(values, indices, log_rest, entropy, self.temperature, self.words)
