"""Replaying labelled texts: what a version answers to them, and how well."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from models.labels import LabelColumn
from models.settings import InputError
from pipelines.evaluating.calibration import reliability
from pipelines.metrics import decision_metrics
from serve.gates import Replayed

TEXT = "text"

Answer = Callable[[list[str]], list[dict[str, Any]]]
"""The results (as `/v1/classify` gives them) of a list of texts."""

_READERS: Mapping[str, Callable[[Path], pa.Table]] = {
    ".jsonl": pa.json.read_json,
    ".csv": lambda path: pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(strings_can_be_null=True)),
    ".parquet": pa.parquet.read_table,
}


def read_labelled(path: Path, rows: int) -> list[dict[str, Any]]:
    """The first rows of a file of labelled texts.

    Raises:
        InputError: it cannot be read, or has no column `text` with texts.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InputError(f"replay: {path} is neither .jsonl nor .csv nor .parquet.")
    try:
        found: list[dict[str, Any]] = reader(path).slice(0, rows).to_pylist()
    except OSError as error:
        raise InputError(f"replay: {path} cannot be read: {error.strerror or type(error).__name__}.") from error
    except (pa.ArrowException, ValueError) as error:  # Its message may quote a row.
        raise InputError(f"replay: {path} cannot be read as {path.suffix[1:]}.") from error
    if not found:
        raise InputError(f"replay: {path} has no rows.")
    for number, row in enumerate(found, 1):
        if not isinstance(row.get(TEXT), str) or not row[TEXT].strip():
            raise InputError(f"replay: row {number} of {path} has no text in its column {TEXT}.")
    return found


def replayed(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[LabelColumn], answer: Answer, at_once: int
) -> list[Replayed]:
    """How well the answers to the rows' texts fit their labels, for each label column that has any.

    Raises:
        InputError: a label is none of the classes, or no row has a label.
    """
    texts = [str(row[TEXT]) for row in rows]
    results = [each for start in range(0, len(texts), at_once) for each in answer(texts[start : start + at_once])]
    found = [scored for column in columns if (scored := _scored(column, rows, results)) is not None]
    if not found:
        names = ", ".join(column.name for column in columns)
        raise InputError(f"replay: no row has a label; its columns must be called as the classifier's: {names}.")
    return found


def _scored(
    column: LabelColumn, rows: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]
) -> Replayed | None:
    known = [place for place, row in enumerate(rows) if row.get(column.name) is not None]
    if not known:
        return None
    labels = np.array([_truth(column, rows[place][column.name], place + 1) for place in known])
    said = [results[place]["labels"][column.name]["probabilities"] for place in known]
    probabilities = np.array([[each[name] for name in column.classes] for each in said], dtype=float)
    decided = probabilities >= 0.5 if column.multi else probabilities.argmax(axis=1)
    metrics = decision_metrics(decided, labels, len(column.classes))
    error = None if column.multi else reliability(probabilities, labels, multi=False).error
    return Replayed(column=column.name, rows=len(known), macro_f1=metrics["macro_f1"], calibration_error=error)


def _truth(column: LabelColumn, label: Any, row: int) -> Any:
    names = label if isinstance(label, list) else [label]
    names = [str(name) for name in names]
    for name in names:
        if name not in column.classes:
            raise InputError(
                f"replay: the label in row {row} is no class of {column.name}; there are "
                f"{', '.join(column.classes[:20])}."
            )
    if column.multi:
        return [each in names for each in column.classes]
    if len(names) != 1:
        raise InputError(f"replay: row {row} has {len(names)} labels for {column.name}, which has one for each text.")
    return column.classes.index(names[0])
