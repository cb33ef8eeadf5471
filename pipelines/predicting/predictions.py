"""Predictions as Arrow columns, the same in the evaluation's file and in batch inference.

    predicted:NAME          string, or list<string> for a multi-label column: the class, or those that hold
    probability:NAME        float: of the likeliest class
    probability:NAME:CLASS  float: of each class, where asked for

The prefixes keep them apart from a source's own columns: the label column's name is often one of those.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.labels import LabelColumn, spans, total_classes
from pipelines.evaluating.calibration import Floats, probabilities
from pipelines.metrics import decide


def prediction_columns(
    columns: Sequence[LabelColumn],
    logits: Floats,
    temperature: Mapping[str, float],
    *,
    every_class: bool,
    present: npt.NDArray[np.bool_] | None = None,
) -> dict[str, pa.Array]:
    """The predictions for `logits` [n, classes of all columns], null where `present` [n] is false."""
    missing = None if present is None else ~present
    found: dict[str, pa.Array] = {}
    for column, span in spans(columns):
        own = logits[:, span]
        probability = probabilities(own, column.multi, temperature.get(column.name, 1.0)).astype(np.float32)
        named = class_names(decide(own, column.multi), column)
        if missing is not None:
            named = [None if gone else name for name, gone in zip(named, missing, strict=True)]
        found[f"predicted:{column.name}"] = pa.array(named, pa.list_(pa.string()) if column.multi else pa.string())
        found[f"probability:{column.name}"] = pa.array(probability.max(axis=1), mask=missing)
        if every_class:
            for index, name in enumerate(column.classes):
                found[f"probability:{column.name}:{name}"] = pa.array(probability[:, index], mask=missing)
    return found


def added_columns(columns: Sequence[LabelColumn], *, every_class: bool) -> set[str]:
    """The names of all columns that batch inference adds to a source's own."""
    nothing = np.zeros((0, total_classes(columns)))
    return {*prediction_columns(columns, nothing, {}, every_class=every_class), "truncated"}


def class_names(decided: npt.NDArray[Any], column: LabelColumn) -> list[Any]:
    """Indices [n], None where below 0, or truth values [n, classes] as the classes' names."""
    if column.multi:
        return [[column.classes[index] for index in np.flatnonzero(row)] for row in decided]
    return [column.classes[index] if index >= 0 else None for index in decided]
