"""Replaying labelled texts: what a version answers to them, and how well."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from models.labels import LabelColumn
from models.settings import InputError
from pipelines.evaluating.calibration import reliability
from pipelines.metrics import decision_metrics
from pipelines.predicting.reading import read_tables, textless_rows, unreadable_rows
from pipelines.preparing import cells
from pipelines.preparing.data import DataSettings
from pipelines.preparing.formats import Source, look
from pipelines.preparing.sources import expand
from serve.gates import Replayed

TEXT = "text"
PAIR = "pair"
_READ_ROWS = 1000

Text = str | list[str]
"""A text, or a pair of them."""

Answer = Callable[[list[Text]], list[dict[str, Any]]]
"""The results (as `/v1/classify` gives them) of a list of texts."""


def read_labelled(reference: str, rows: int, *, pair: bool = False) -> list[dict[str, Any]]:
    """The first rows of labelled files, of all forms that a recipe's data may have.

    Args:
        reference: a file, a folder, or a glob.
        rows: how many.
        pair: whether there has to be a column `pair` with each text's partner.

    Raises:
        InputError: a file cannot be read, or has no column `text` (`pair`) with texts.
    """
    settings = DataSettings(source=reference, text=TEXT, text_pair=PAIR if pair else None)
    found: list[dict[str, Any]] = []
    try:
        for path in expand(reference):
            for source in look(path, settings, None):
                found += _read(source, settings, rows - len(found))
                if len(found) == rows:
                    return found
    except InputError as error:
        raise InputError(f"replay: {error}") from error
    if not found:
        raise InputError(f"replay: {reference} has no rows.")
    return found


def _read(source: Source, settings: DataSettings, rows: int) -> list[dict[str, Any]]:
    """The first rows of one file.

    Raises:
        InputError: it cannot be read, or has no texts where they should be.
    """
    if missing := [column for column in settings.text_columns if column not in source.columns]:
        raise InputError(f"{source.path} has no column {missing[0]}.")
    columns = " or ".join(settings.text_columns)
    found: list[dict[str, Any]] = []
    for table in _tables(source, settings, min(rows, _READ_ROWS)):
        lost = {*unreadable_rows(table), *textless_rows(table)}
        for place, row in enumerate(table.slice(0, rows - len(found)).to_pylist()):
            if place in lost or not all((row.get(column) or "").strip() for column in settings.text_columns):
                raise InputError(f"row {len(found) + 1} of {source.path} has no text in its column {columns}.")
            found.append(row)
        if len(found) == rows:
            break
    return found


def _tables(source: Source, settings: DataSettings, rows: int) -> Iterator[pa.Table]:
    """The file's rows, labels that it records by their numbers by their names.

    Raises:
        InputError: it cannot be read. The sentence is kept in the store, so it quotes nothing of the file.
    """
    try:
        for table in read_tables(source, settings, rows):
            named = table
            for column, names in source.class_names.items():
                labels, _ = cells.as_text(table[column], names, source.path)
                named = named.set_column(table.column_names.index(column), column, labels)
            yield named
    except InputError as error:
        line = re.search(r"\bline \d+\b", str(error))
        where = f", {line.group()}," if line else ""
        raise InputError(f"{source.path}{where} cannot be read as {source.format}.") from error


def replayed(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[LabelColumn],
    answer: Answer,
    at_once: int,
    *,
    pair: bool = False,
) -> list[Replayed]:
    """How well the answers to the rows' texts fit their labels, for each label column that has any.

    Raises:
        InputError: a label is none of the classes, or no row has a label.
    """
    texts: list[Text] = [[row[TEXT], row[PAIR]] if pair else row[TEXT] for row in rows]
    results = [each for start in range(0, len(texts), at_once) for each in answer(texts[start : start + at_once])]
    found = [scored for column in columns if (scored := _scored(column, rows, results)) is not None]
    if not found:
        names = ", ".join(column.name for column in columns)
        raise InputError(f"replay: no row has a label; its columns must be called as the classifier's: {names}.")
    return found


def _scored(
    column: LabelColumn, rows: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]
) -> Replayed | None:
    known = [place for place, row in enumerate(rows) if cells.plain(row.get(column.name)) not in (None, "")]
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
    spelled = cells.plain(label)
    names = spelled if isinstance(spelled, list) else [spelled]
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
