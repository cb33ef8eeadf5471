"""The metrics of a classifier, by name: used for validation while training, for the evaluation and for its gate.

One label column has plain keys (`accuracy`), several have `COLUMN.accuracy`. A column's keys are

    accuracy         share of texts whose label is the predicted one (single-label columns only)
    subset_accuracy  share of texts with exactly the right classes (multi-label columns only)
    macro_f1         mean of the classes' F1, over the classes that occur in the labels or the predictions
    weighted_f1      mean of the classes' F1, weighted by how often each is a label
    micro_f1         F1 of all decisions together (multi-label columns only: for a single label it is the accuracy)
    log_loss, ece    negative log likelihood (nats), expected calibration error: less is better, so no gate

A class of a multi-label column is predicted where its probability is at least 1/2, that is, its logit at least 0.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.labels import LabelColumn, spans
from models.settings import InputError
from pipelines.evaluating.calibration import Floats, log_loss, probabilities, reliability

Labels = npt.NDArray[Any]

_SINGLE = ("accuracy", "macro_f1", "weighted_f1")
_MULTI = ("subset_accuracy", "macro_f1", "weighted_f1", "micro_f1")
METRICS = frozenset({*_SINGLE, *_MULTI})
"""What may be maximised (`finetune.metric`) or demanded (`evaluate.gate`): more is better for each."""


@dataclass(frozen=True)
class ClassScores:
    """How each class fares. Arrays [classes]; a quotient with nothing below it is 0."""

    hits: npt.NDArray[np.int64]
    support: npt.NDArray[np.int64]
    """How often the class is a label."""
    predicted: npt.NDArray[np.int64]
    """How often it is predicted."""

    @property
    def precision(self) -> Floats:
        """The share of its predictions that are right."""
        return _quotient(self.hits, self.predicted)

    @property
    def recall(self) -> Floats:
        """The share of its labels that are found."""
        return _quotient(self.hits, self.support)

    @property
    def f1(self) -> Floats:
        """The harmonic mean of precision and recall."""
        return _quotient(2 * self.hits, self.support + self.predicted)

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that occur, as labels or predictions; as scikit-learn has it."""
        occurs = self.support + self.predicted > 0
        return float(self.f1[occurs].mean()) if occurs.any() else 0.0

    @property
    def weighted_f1(self) -> float:
        """The mean F1, weighted by support."""
        return float(_quotient((self.f1 * self.support).sum(), self.support.sum()))

    @property
    def micro_f1(self) -> float:
        """F1 of all decisions together."""
        return float(_quotient(2 * self.hits.sum(), (self.support + self.predicted).sum()))


def classification_metrics(
    logits: Floats, labels: Mapping[str, Labels], columns: Sequence[LabelColumn]
) -> dict[str, float]:
    """All metrics of all label columns, under flat keys.

    `logits` is [n, classes of all columns]. `labels` holds for each column int [n], or [n, classes] of ones and zeros
    (or bool) where the column is multi-label; -1 where a label is missing. Missing labels count nowhere; a column
    that has no label at all has no metrics.
    """
    found: dict[str, float] = {}
    for column, span in spans(columns):
        prefix = f"{column.name}." if len(columns) > 1 else ""
        own = column_metrics(logits[:, span], labels[column.name], column.multi)
        found |= {prefix + name: value for name, value in own.items()}
    return found


def column_metrics(logits: Floats, labels: Labels, multi: bool, temperature: float = 1.0) -> dict[str, float]:
    """One column's metrics from its own logits [n, classes]; empty where no label is present."""
    present = labelled(labels)
    logits, labels = logits[present], truth(labels[present])
    if len(labels) == 0:
        return {}
    found = decision_metrics(decide(logits, multi), labels, logits.shape[1])
    found["log_loss"] = log_loss(logits, labels, multi, temperature)
    found["ece"] = reliability(probabilities(logits, multi, temperature), labels, multi).error
    return found


def decision_metrics(decided: Labels, labels: Labels, classes: int) -> dict[str, float]:
    """The metrics that need decisions only; all labels present. For classifiers without probabilities too."""
    scores = class_scores(decided, labels, classes)
    if labels.ndim == 2:
        found = {"subset_accuracy": float((decided == labels).all(axis=1).mean())}
    else:
        found = {"accuracy": float((decided == labels).mean())}
    names = _MULTI if labels.ndim == 2 else _SINGLE
    return found | {name: float(getattr(scores, name)) for name in names[1:]}


def labelled(labels: Labels) -> npt.NDArray[np.bool_]:
    """Which rows have a label [n]."""
    known = np.asarray(labels) >= 0
    return np.all(known, axis=1) if known.ndim == 2 else np.asarray(known, dtype=bool)


def truth(labels: Labels) -> Labels:
    """Labels that are all present, as they are compared: indices [n], or truth values [n, classes]."""
    return labels.astype(bool) if labels.ndim == 2 else labels


def decide(logits: Floats, multi: bool) -> Labels:
    """The predicted class [n], or the classes that hold [n, classes]."""
    return logits >= 0 if multi else logits.argmax(axis=1)


def class_scores(decided: Labels, labels: Labels, classes: int) -> ClassScores:
    """Counts by class, from indices [n] or truth values [n, classes]; all labels present."""
    if labels.ndim == 2:
        return ClassScores((decided & labels).sum(axis=0), labels.sum(axis=0), decided.sum(axis=0))
    matrix = confusion(decided, labels, classes)
    return ClassScores(matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0))


def confusion(decided: Labels, labels: Labels, classes: int) -> npt.NDArray[np.int64]:
    """How often each label (row) was given each prediction (column): [classes, classes]."""
    flat = np.bincount(labels.astype(np.int64) * classes + decided, minlength=classes * classes)
    return flat.reshape(classes, classes)


def known_metrics(columns: Mapping[str, bool]) -> list[str]:
    """The names that `metric_of` answers for these label columns (name: whether it is multi-label)."""
    own = {name: _MULTI if multi else _SINGLE for name, multi in columns.items()}
    if len(own) == 1:
        return list(*own.values())
    shared = [metric for metric in sorted(METRICS) if all(metric in metrics for metrics in own.values())]
    return [*shared, *(f"{name}.{metric}" for name, metrics in own.items() for metric in metrics)]


def metric_problem(name: str, columns: Mapping[str, bool] | None = None) -> str | None:
    """What is wrong with a metric's name, and what would be right; None where it is known.

    `columns` are the label columns (name: whether it is multi-label), where they are known yet.
    """
    known = known_metrics(columns) if columns else sorted(METRICS)
    if name in known or (not columns and name.rpartition(".")[2] in METRICS):
        return None
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {close[0]}? There are" if close else "there are"
    return f"{name!r} is no metric here; {meant} {', '.join(known)}"


def check_metric(setting: str, name: str, columns: Sequence[LabelColumn]) -> None:
    """Refuses a metric that these label columns do not have.

    Raises:
        InputError: names the setting, the metric and those there are.
    """
    if problem := metric_problem(name, {column.name: column.multi for column in columns}):
        raise InputError(f"{setting}: {problem}.")


def metric_of(metrics: Mapping[str, float], name: str, columns: Sequence[LabelColumn]) -> float:
    """The metric called `name` out of `classification_metrics`; a plain name is the mean over several columns.

    Raises:
        InputError: it cannot be told, because no row of a column it needs has a label.
    """
    keys = [f"{column.name}.{name}" for column in columns] if len(columns) > 1 and "." not in name else [name]
    if missing := [key for key in keys if key not in metrics]:
        raise InputError(f"the metric {missing[0]} cannot be told: no row of the split measured has that label.")
    return float(np.mean([metrics[key] for key in keys]))


def _quotient(above: npt.ArrayLike, below: npt.ArrayLike) -> Floats:
    above, below = np.asarray(above, float), np.asarray(below, float)
    return np.asarray(np.divide(above, below, out=np.zeros_like(above), where=below > 0))
