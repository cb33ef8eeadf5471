"""The cleaning steps between decoding and duplicates: where, repair, normalise, redact, length, labels."""

import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from models.settings import InputError
from models.text import TextSettings, normalise, redact, repair
from pipelines.prepared import SPLITS
from pipelines.preparing.data import DataSettings, LabelSettings, split_name
from pipelines.preparing.decoding import internal_name
from pipelines.preparing.sieve import Sieve, mask, whole

_MOST_CLASSES = 10_000


class CleaningSettings(TextSettings):
    """How the text is cleaned."""

    min_characters: int = Field(1, ge=1, description="Shorter texts are rejected.")
    max_characters: int = Field(100_000, ge=1, description="Longer texts are rejected.")


def clean(sieve: Sieve, settings: DataSettings, cleaning: CleaningSettings, given: str | None) -> None:
    """Takes decoded rows through all steps; afterwards the table has text, text_pair, given, label:* and column:*.

    `given` is the split that the recipe gives the whole file.

    Raises:
        InputError: a label column has more than 10,000 different values.
    """
    _where(sieve, settings)
    texts = ["text"]
    if settings.text_pair:
        texts.append("text_pair")
        pair = internal_name(settings.text_pair, settings)
        sieve.table = sieve.table.append_column("text_pair", sieve.table[pair])
    for column in texts:
        sieve.drop("length", ~mask(pc.is_valid(sieve.table[column])), f"the {column} is missing")
        if cleaning.repair:
            sieve.replace("repair", column, repair(whole(sieve.table[column])))
        if cleaning.normalise != "none":
            sieve.replace("normalise", column, normalise(whole(sieve.table[column]), cleaning.normalise))
        if cleaning.redact is not None:
            masked, counts = redact(whole(sieve.table[column]), cleaning.redact.redactor)
            sieve.replace("redact", column, masked)
            sieve.redacted.update(counts)
    _length(sieve, cleaning, texts)
    _labels(sieve, settings)
    _given(sieve, settings, given)
    columns = {name: sieve.table[name] for name in ("position", "line", "given", *texts)}
    columns |= {f"label:{label.column}": sieve.table[f"label:{label.column}"] for label in settings.labels}
    columns |= {f"column:{name}": _written(sieve.table[internal_name(name, settings)]) for name in settings.columns}
    sieve.table = pa.table(columns)


def _written(column: Any) -> Any:
    """A column to keep; one of lists as JSON, since another unit's may hold none."""
    if pa.types.is_string(column.type):
        return column
    cells = [cell if cell is None else json.dumps(cell, ensure_ascii=False) for cell in column.to_pylist()]
    return pa.array(cells, pa.string())


def _where(sieve: Sieve, settings: DataSettings) -> None:
    for column, pattern in settings.where.items():
        search = re.compile(pattern).search
        cells = whole(sieve.table[internal_name(column, settings)]).to_pylist()
        bad = np.array(
            [cell is None or not search(cell if isinstance(cell, str) else str(cell)) for cell in cells], bool
        )
        sieve.drop("where", bad, f"{column} does not match data.where")


def _length(sieve: Sieve, cleaning: CleaningSettings, texts: list[str]) -> None:
    """Drops rows whose text (both parts of a pair together: a headline may lack its article) is too short or long."""
    lengths = np.sum([whole(pc.utf8_length(sieve.table[column])).to_numpy() for column in texts], axis=0)
    short, long = lengths < cleaning.min_characters, lengths > cleaning.max_characters
    reasons = [
        "the text is empty"
        if length == 0
        else f"{length} characters, fewer than {cleaning.min_characters}"
        if length < cleaning.min_characters
        else f"{length} characters, more than {cleaning.max_characters}"
        for length in lengths[short | long].tolist()
    ]
    sieve.drop("length", short | long, reasons)


def _labels(sieve: Sieve, settings: DataSettings) -> None:
    for label in settings.labels:
        column = whole(sieve.table[internal_name(label.column, settings)])
        values = _multi_label(column, label) if label.multi else _single_label(column, label)
        sieve.table = sieve.table.append_column(f"label:{label.column}", values)
    for label in settings.labels:
        _drop_unknown(sieve, label)
    if settings.labels:
        names = [f"label:{label.column}" for label in settings.labels]
        missing = np.logical_and.reduce([mask(pc.is_null(sieve.table[name])) for name in names])
        sieve.drop("labels", missing, f"no label in {', '.join(label.column for label in settings.labels)}")


def _single_label(column: pa.Array, label: LabelSettings) -> pa.Array:
    if not pa.types.is_string(column.type):
        raise InputError(f"the label column {label.column!r} holds lists; set multi: true if a text may have several.")
    return _renamed(column, label)


def _renamed(cells: pa.Array, label: LabelSettings) -> pa.Array:
    """Cells without outer spaces and under their new names; empty ones are missing."""
    encoded = pc.dictionary_encode(cells)
    check_classes(label.column, len(encoded.dictionary))
    trimmed = [value.strip() for value in encoded.dictionary.to_pylist()]
    names = pa.array([label.names.get(value, value) or None for value in trimmed], pa.string())
    return pc.take(names, encoded.indices)


def check_classes(column: str, count: int) -> None:
    """Tells a column that is no label from one: each class is a row of the classifier's last layer.

    Raises:
        InputError: there are more than 10,000 classes.
    """
    if count > _MOST_CLASSES:
        raise InputError(
            f"the label column {column!r} has more than {_MOST_CLASSES:,} different values; is it another column?"
        )


def _multi_label(column: pa.Array, label: LabelSettings) -> pa.Array:
    """Lists of classes, sorted and each once. An empty cell has none of the classes; a null one is missing."""
    if pa.types.is_string(column.type):
        column = pc.split_pattern(column, label.separator)
    flat = _renamed(whole(column.flatten()), label).to_pylist()
    offsets = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy())])
    lists = [
        sorted({name for name in flat[start:stop] if name}) if valid else None
        for start, stop, valid in zip(offsets[:-1], offsets[1:], column.is_valid().to_pylist(), strict=True)
    ]
    return pa.array(lists, pa.list_(pa.string()))


def _drop_unknown(sieve: Sieve, label: LabelSettings) -> None:
    if label.classes is None:
        return
    column = whole(sieve.table[f"label:{label.column}"])
    known = pa.array(label.classes, pa.string())
    if label.multi:
        cells = column.to_pylist()
        strange = [next((name for name in cell or () if name not in label.classes), None) for cell in cells]
    else:
        strange = pc.if_else(pc.is_in(column, known), None, column).to_pylist()
    bad = np.array([name is not None for name in strange], bool)
    sieve.drop(
        "labels", bad, [f"{label.column} has the unknown class {name!r}" for name in strange if name is not None]
    )


def _given(sieve: Sieve, settings: DataSettings, given: str | None) -> None:
    """Adds the split that a row comes with, as its index in SPLITS, or -1."""
    if settings.split is None:
        codes = np.full(len(sieve.table), SPLITS.index(given) if given else -1, np.int8)
        sieve.table = sieve.table.append_column("given", pa.array(codes))
        return
    cells = whole(sieve.table[internal_name(settings.split, settings)]).to_pylist()
    names = [split_name(cell) if isinstance(cell, str) else None for cell in cells]
    codes = np.array([SPLITS.index(name) if name else -1 for name in names], np.int8)
    sieve.table = sieve.table.append_column("given", pa.array(codes))
    reasons = [
        f"{settings.split} is {cell!r}, which is no split" for cell, code in zip(cells, codes, strict=True) if code < 0
    ]
    sieve.drop("split", codes < 0, reasons)
