"""Counts of the last texts answered: what a replica knows of them, in bins.

Nothing is kept of a text but the bins it is counted in, so counting one costs the same whatever the window.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONFIDENCE_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Upper edges, each within its bin; the last bin has what is above."""

LENGTH_EDGES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""The same for tokens of a text, special tokens included: finer where texts are short and a few tokens are much."""

CONFIDENCE_BINS = len(CONFIDENCE_EDGES) + 1
LENGTH_BINS = len(LENGTH_EDGES) + 1

_STEPS = 10


@dataclass(slots=True)
class ColumnTally:
    """Counts of one label column."""

    labels: list[int]
    confidence: list[int]


@dataclass(slots=True)
class Tally:
    """Counts of texts and of what was said of them."""

    columns: list[ColumnTally]
    lengths: list[int]
    texts: int = 0
    tokens: int = 0
    unknown: int = 0

    @classmethod
    def empty(cls, label_bins: Sequence[int]) -> "Tally":
        """Nothing counted yet; `label_bins` says how many bins each label column has."""
        columns = [ColumnTally([0] * bins, [0] * CONFIDENCE_BINS) for bins in label_bins]
        return cls(columns, [0] * LENGTH_BINS)

    def add(self, other: "Tally") -> None:
        """Adds another's counts to these."""
        for own, given in zip(self.columns, other.columns, strict=True):
            own.labels = _added(own.labels, given.labels)
            own.confidence = _added(own.confidence, given.confidence)
        self.lengths = _added(self.lengths, other.lengths)
        self.texts += other.texts
        self.tokens += other.tokens
        self.unknown += other.unknown


def _added(first: Sequence[int], second: Sequence[int]) -> list[int]:
    return [one + other for one, other in zip(first, second, strict=True)]


class Window:
    """Counts of the last `texts` texts, in steps of a tenth: it holds up to a tenth more before the oldest are let go.

    Nothing is kept of a text but the bins it is counted in: O(1) a text, O(bins) of memory.

    Args:
        label_bins: how many bins each label column has.
        texts: how many it holds.
    """

    def __init__(self, label_bins: Sequence[int], texts: int) -> None:
        self._label_bins = tuple(label_bins)
        self._step = max(1, texts // _STEPS)
        self._full: deque[Tally] = deque()
        self._kept = -(-texts // self._step)
        self._now = Tally.empty(label_bins)
        self._gone = Tally.empty(label_bins)
        self.confidence_sums = [0.0] * len(self._label_bins)
        """By label column, of all texts ever counted. Not added up of parts, as counts are: rounded in another order
        they could become less, which Prometheus takes for a counter that began anew."""

    def add(self, tokens: int, unknown: int, said: Iterable[tuple[Sequence[int], float]]) -> None:
        """Counts a text: its tokens, how many are unknown, and for each label column the bins of its labels and the
        likeliest one's probability.
        """
        now = self._now
        now.texts += 1
        now.tokens += tokens
        now.unknown += unknown
        now.lengths[bisect_left(LENGTH_EDGES, tokens)] += 1
        for index, (labels, confidence) in enumerate(said):
            column = now.columns[index]
            for label in labels:
                column.labels[label] += 1
            column.confidence[bisect_left(CONFIDENCE_EDGES, confidence)] += 1
            self.confidence_sums[index] += confidence
        if now.texts == self._step:
            self._turn()

    def _turn(self) -> None:
        self._full.append(self._now)
        self._now = Tally.empty(self._label_bins)
        if len(self._full) > self._kept:
            self._gone.add(self._full.popleft())

    def counts(self) -> Tally:
        """Of the texts in the window."""
        return self._sum()

    def totals(self) -> Tally:
        """Of all texts ever counted."""
        return self._sum(self._gone)

    def _sum(self, *more: Tally) -> Tally:
        found = Tally.empty(self._label_bins)
        for part in (*more, *self._full, self._now):
            found.add(part)
        return found
