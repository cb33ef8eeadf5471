"""Measuring: from a split's logits and labels to everything that an evaluation says. Pure functions of arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.abstaining import Abstaining
from models.labels import LabelColumn, spans
from pipelines.evaluating.calibration import (
    Reliability,
    abstaining,
    fit_temperature,
    probabilities,
    reliability,
)
from pipelines.evaluating.scoring import Scored
from pipelines.metrics import (
    ClassScores,
    class_scores,
    column_metrics,
    confusion,
    decide,
    decision_metrics,
    labelled,
    truth,
)

SMALL_SLICE = 50
"""Slices with fewer labelled rows say little, and are marked."""
_MOST_SLICES = 100


@dataclass(frozen=True)
class Slice:
    """The rows with one value of a kept column."""

    column: str
    value: str
    rows: int
    metrics: dict[str, float]

    @property
    def small(self) -> bool:
        """Whether the numbers are of too few rows to be relied upon."""
        return self.rows < SMALL_SLICE


@dataclass(frozen=True)
class ColumnEvaluation:
    """All that is measured of one label column. A column without labels in the split has zeros and no metrics."""

    labelled: int
    """Rows that have a label; the others count nowhere."""
    metrics: dict[str, float]
    """As `pipelines.metrics` names them, before calibration."""
    temperature: float
    calibrated: dict[str, float]
    """log_loss and ece with the temperature."""
    scores: ClassScores
    matrix: npt.NDArray[np.int64] | None
    """Labels by predictions [classes, classes]; None for a multi-label column."""
    reliability: Reliability
    calibrated_reliability: Reliability
    slices: list[Slice] = field(default_factory=list)
    abstaining: list[Abstaining] = field(default_factory=list)
    """On the validation split; of single-label columns."""

    @property
    def calibrated_ece(self) -> float:
        """The expected calibration error with the temperature."""
        return self.calibrated.get("ece", 0.0)


@dataclass(frozen=True)
class Evaluation:
    """All that is measured of a classifier on a split."""

    split: str
    rows: int
    columns: dict[str, ColumnEvaluation]
    baseline: dict[str, dict[str, float]]
    """By label column; empty where none was wanted."""
    texts_per_second: float
    precision: str
    calibrated_on: int
    """Rows of the validation split that the temperatures were fitted on; 0 leaves them at 1."""
    classes: dict[str, tuple[str, ...]]
    without_pretraining: dict[str, dict[str, float]] = field(default_factory=dict)
    """By label column, of a classifier made without the recipe's pretraining; empty where none was wanted."""

    def compared(self, column: str) -> dict[str, dict[str, float]]:
        """Metrics of whatever the classifier's own are to be compared with, by its name."""
        known = {"baseline": self.baseline, "without pretraining": self.without_pretraining}
        return {name: values[column] for name, values in known.items() if column in values}

    def plain(self) -> dict[str, float]:
        """The classifier's metrics under flat keys, as `pipelines.metrics.classification_metrics` has them."""
        return self._flattened({name: column.metrics for name, column in self.columns.items()})

    def flat(self) -> dict[str, float]:
        """The numbers that the artifact's record shows, under flat keys."""
        more = {
            name: {"temperature": c.temperature, **{f"calibrated_{k}": v for k, v in c.calibrated.items()}}
            for name, c in self.columns.items()
        }
        baseline = {f"baseline.{key}": value for key, value in self._flattened(self.baseline).items()}
        baseline |= {f"without_pretraining.{k}": v for k, v in self._flattened(self.without_pretraining).items()}
        speed = {"rows": self.rows, "texts_per_second": round(self.texts_per_second, 1)}
        return {**self.plain(), **self._flattened(more), **baseline, **speed}

    def _flattened(self, by_column: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        return {
            f"{name}.{key}" if len(self.columns) > 1 else key: value
            for name, values in by_column.items()
            for key, value in values.items()
        }

    def document(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {
            "split": self.split,
            "rows": self.rows,
            "precision": self.precision,
            "texts_per_second": self.texts_per_second,
            "calibrated_on": self.calibrated_on,
            "columns": {name: self._column_document(name) for name in self.columns},
        }

    def _column_document(self, name: str) -> dict[str, Any]:
        found, classes = self.columns[name], self.classes[name]
        scores = found.scores
        numbers = zip(
            classes, scores.precision, scores.recall, scores.f1, scores.support, scores.predicted, strict=True
        )
        keys = ("precision", "recall", "f1", "support", "predicted")
        return {
            "labelled": found.labelled,
            "metrics": found.metrics,
            "temperature": found.temperature,
            "calibrated": found.calibrated,
            "baseline": self.baseline.get(name),
            "without_pretraining": self.without_pretraining.get(name),
            "classes": {row[0]: {k: v.item() for k, v in zip(keys, row[1:], strict=True)} for row in numbers},
            "confusion": found.matrix.tolist() if found.matrix is not None else None,
            "slices": [{**asdict(one), "small": one.small} for one in found.slices],
        }


def measure(
    columns: Sequence[LabelColumn],
    scored: Scored,
    validation: Scored | None,
    kept: Mapping[str, Sequence[str | None]],
    *,
    split: str,
    baseline: dict[str, dict[str, float]],
    texts_per_second: float,
    precision: str,
    without_pretraining: Scored | None = None,
) -> Evaluation:
    """Measures the scored split; temperatures are fitted on `validation`, slices taken by the `kept` columns."""
    found = {}
    for column, span in spans(columns):
        temperature, curve = 1.0, list[Abstaining]()
        if validation is not None:
            has = labelled(validation.labels[column.name])
            logits, labels = validation.logits[has, span], truth(validation.labels[column.name][has])
            temperature = fit_temperature(logits, labels, column.multi)
            if len(labels) and not column.multi:
                curve = abstaining(probabilities(logits, False, temperature), labels)
        measured = _measure_column(column, scored.logits[:, span], scored.labels[column.name], temperature, kept)
        found[column.name] = replace(measured, abstaining=curve)
    return Evaluation(
        split=split,
        rows=len(scored.rows),
        columns=found,
        baseline=baseline,
        texts_per_second=texts_per_second,
        precision=precision,
        calibrated_on=0 if validation is None else len(validation.rows),
        classes={column.name: column.classes for column in columns},
        without_pretraining=_metrics_of(columns, without_pretraining) if without_pretraining else {},
    )


def _metrics_of(columns: Sequence[LabelColumn], scored: Scored) -> dict[str, dict[str, float]]:
    return {
        column.name: column_metrics(scored.logits[:, span], scored.labels[column.name], column.multi)
        for column, span in spans(columns)
    }


def _measure_column(
    column: LabelColumn,
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[Any],
    temperature: float,
    kept: Mapping[str, Sequence[str | None]],
) -> ColumnEvaluation:
    has = labelled(labels)
    calibrated = column_metrics(logits, labels, column.multi, temperature)
    slices = [one for name, values in kept.items() for one in _slices(column, name, values, logits, labels)]
    logits, labels = logits[has], truth(labels[has])
    decided, classes = decide(logits, column.multi), len(column.classes)
    return ColumnEvaluation(
        labelled=int(has.sum()),
        metrics=column_metrics(logits, labels, column.multi),
        temperature=temperature,
        calibrated={name: calibrated[name] for name in ("log_loss", "ece") if name in calibrated},
        scores=class_scores(decided, labels, classes),
        matrix=None if column.multi else confusion(decided, labels, classes),
        reliability=reliability(probabilities(logits, column.multi), labels, column.multi),
        calibrated_reliability=reliability(probabilities(logits, column.multi, temperature), labels, column.multi),
        slices=slices,
    )


def _slices(
    column: LabelColumn,
    name: str,
    values: Sequence[str | None],
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[Any],
) -> list[Slice]:
    """One slice for each of the most frequent values, the largest first."""
    has = labelled(labels)
    named = np.array(["(none)" if value is None else str(value) for value in values], dtype=object)[has]
    found, counts = np.unique(named.astype(str), return_counts=True)
    decided, labels = decide(logits[has], column.multi), truth(labels[has])
    slices = []
    for position in np.argsort(-counts, kind="stable")[:_MOST_SLICES]:
        inside = named == found[position]
        metrics = decision_metrics(decided[inside], labels[inside], len(column.classes))
        slices.append(Slice(name, str(found[position]), int(counts[position]), metrics))
    return slices
