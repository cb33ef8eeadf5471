"""Drift: whether the texts that are classified now are like those that the classifier was evaluated on.

No labels are needed: what is compared are the predicted labels, how sure the classifier is of them, the texts' lengths
and the share of tokens that the vocabulary lacks. `Reference` holds their distributions on the validation split (made
by `evaluate`), a `Window` (`models.window`) those of the last texts answered; `compare` tells how far the two are
apart, by the population stability index, and how far they would be by chance. It takes time by the bins alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field

from models.labels import LabelColumn
from models.settings import Settings
from models.window import CONFIDENCE_BINS, CONFIDENCE_EDGES, LENGTH_BINS, LENGTH_EDGES, Tally

EPSILON = 1e-4
"""What an empty bin is taken to hold."""

MAX_LABELS = 200
"""Classes of a label column that are counted one by one; the rarest beyond them count together."""

OTHER = "_other_"
"""Under this name."""

NONE = "_none_"
"""A text of which no class holds (multi-label), or of which the model gave no finite numbers."""

_Z = 2.3263
"""The normal distribution's 0.99 quantile."""


class ColumnReference(Settings):
    """A label column as it is predicted on the reference split."""

    labels: dict[str, float]
    """By class, and for NONE, its share of all labels given."""
    confidence: tuple[float, ...] = Field(min_length=CONFIDENCE_BINS, max_length=CONFIDENCE_BINS)
    """Shares by the likeliest class's calibrated probability, between CONFIDENCE_EDGES."""


class Reference(Settings):
    """What texts and answers look like where nothing has drifted: `reference.json` of `evaluate`."""

    split: str
    texts: int = Field(ge=1)
    columns: dict[str, ColumnReference]
    lengths: tuple[float, ...] = Field(min_length=LENGTH_BINS, max_length=LENGTH_BINS)
    """Shares by tokens of a text, between LENGTH_EDGES."""
    unknown_tokens: float
    """The share of tokens that are the tokenizer's unknown one."""


def make_reference(
    columns: Sequence[LabelColumn],
    decided: Mapping[str, npt.NDArray[np.generic]],
    confidence: Mapping[str, npt.NDArray[np.floating]],
    lengths: npt.NDArray[np.integer],
    unknown_tokens: int,
    split: str,
) -> Reference:
    """The reference for a split of n texts.

    Args:
        columns: the classifier's label columns.
        decided: by column, class indices [n], or bool [n, classes] for a multi-label column.
        confidence: by column, the likeliest class's calibrated probability [n].
        lengths: tokens of each text [n].
        unknown_tokens: how many of all those tokens are the unknown one.
        split: which it is.
    """
    found = {}
    for column in columns:
        given = decided[column.name]
        if column.multi:
            counts = [*given.astype(bool).sum(axis=0), (~given.astype(bool)).all(axis=1).sum()]
        else:
            counts = [*np.bincount(given.astype(np.int64), minlength=len(column.classes)), 0]
        found[column.name] = ColumnReference(
            labels=dict(zip((*column.classes, NONE), shares(counts), strict=True)),
            confidence=tuple(shares(_binned(confidence[column.name], CONFIDENCE_EDGES))),
        )
    return Reference(
        split=split,
        texts=len(lengths),
        columns=found,
        lengths=tuple(shares(_binned(lengths, LENGTH_EDGES))),
        unknown_tokens=unknown_tokens / max(1, int(lengths.sum())),
    )


def _binned(values: npt.NDArray[np.generic], edges: Sequence[float]) -> list[int]:
    places = np.searchsorted(np.asarray(edges), values, side="left")
    return [int(count) for count in np.bincount(places, minlength=len(edges) + 1)]


def shares(counts: Sequence[float]) -> list[float]:
    """The counts as parts of their sum; zeros where that is 0."""
    total = float(sum(counts))
    return [float(count) / total if total else 0.0 for count in counts]


def psi(expected_shares: Sequence[float], observed_shares: Sequence[float]) -> float:
    """The population stability index of two distributions over the same bins: 0 where they are equal, never negative.

    The sum of (observed - expected) * ln(observed / expected), where empty bins count as EPSILON. The usual reading:
    below 0.1 nothing has changed, up to 0.25 something, above it much (Siddiqi, Credit Risk Scorecards, 2006). It is
    the Jeffreys divergence, Kullback-Leibler in both directions.

    Raises:
        ValueError: the two have not the same bins.
    """
    if len(expected_shares) != len(observed_shares):
        raise ValueError(f"{len(expected_shares)} bins were expected but {len(observed_shares)} observed")
    expected = np.maximum(np.asarray(expected_shares, dtype=np.float64), EPSILON)
    observed = np.maximum(np.asarray(observed_shares, dtype=np.float64), EPSILON)
    return float(((observed - expected) * np.log(observed / expected)).sum())


def psi_noise(bins: int, expected_texts: int, observed_texts: int) -> float:
    """The index that one of a hundred pairs of samples of one and the same distribution exceeds.

    Without drift the index is distributed as (1/n + 1/m) times chi-squared with bins - 1 degrees of freedom (Yurdakul
    and Naranjo, Statistical Properties of the Population Stability Index, 2020); its quantile by Wilson and Hilferty.
    """
    if bins < 2:
        return 0.0
    freedom, spread = bins - 1, 2 / (9 * (bins - 1))
    quantile = freedom * (1 - spread + _Z * math.sqrt(spread)) ** 3
    return quantile * (1 / expected_texts + 1 / observed_texts)


@dataclass(frozen=True)
class LabelBins:
    """Where the classes of one label column are counted."""

    names: tuple[str, ...]
    """Of the bins; the number of them is bounded however many classes there are."""
    place: Mapping[str, int]
    """By class, its bin; NONE has one too."""

    @classmethod
    def of(cls, column: LabelColumn, reference: ColumnReference | None) -> "LabelBins":
        """The bins of a column: the classes most often predicted on the reference split have one each."""
        frequency = reference.labels if reference else {}
        ranked = sorted(column.classes, key=lambda name: -frequency.get(name, 0.0))  # Equals keep their order.
        kept, rest = set(ranked[:MAX_LABELS]), ranked[MAX_LABELS:]
        names = [name for name in column.classes if name in kept]
        # A class that is really called so shares the bin: two of one name would make a metrics page unreadable.
        names += [name for name, wanted in ((OTHER, bool(rest)), (NONE, True)) if wanted and name not in kept]
        place = {name: index for index, name in enumerate(names)}
        if rest:
            place |= dict.fromkeys(rest, place[OTHER])
        return cls(tuple(names), place)

    def expected(self, reference: ColumnReference) -> list[float]:
        """The reference's shares by bin."""
        found = [0.0] * len(self.names)
        for name, share in reference.labels.items():
            found[self.place[name]] += share
        return found


@dataclass(frozen=True)
class Shift:
    """How far one signal is from the reference."""

    signal: str
    """labels, confidence or length."""
    column: str
    """The label column; empty for lengths."""
    psi: float
    noise: float
    """What one window of a hundred would exceed by chance."""


def compare(reference: Reference, bins: Mapping[str, LabelBins], counts: Tally) -> list[Shift]:
    """How far each signal of a window that is not empty is from the reference; `bins` by label column, in order."""
    found = []
    for (name, column_bins), counted in zip(bins.items(), counts.columns, strict=True):
        own = reference.columns[name]
        found.append(_shift("labels", name, column_bins.expected(own), counted.labels, reference.texts, counts.texts))
        found.append(_shift("confidence", name, own.confidence, counted.confidence, reference.texts, counts.texts))
    return [*found, _shift("length", "", reference.lengths, counts.lengths, reference.texts, counts.texts)]


def _shift(
    signal: str, column: str, expected: Sequence[float], counted: Sequence[int], expected_texts: int, texts: int
) -> Shift:
    observed = shares(counted)
    used = sum(1 for one, other in zip(expected, observed, strict=True) if one or other)
    return Shift(signal, column, psi(expected, observed), psi_noise(used, expected_texts, texts))


def unknown_difference(reference: Reference, counts: Tally) -> float:
    """The window's share of unknown tokens, less the reference's."""
    return unknown_share(counts) - reference.unknown_tokens


def unknown_share(counts: Tally) -> float:
    """The share of the counted tokens that the vocabulary lacks."""
    return counts.unknown / max(1, counts.tokens)
