"""Step decode: a unit's bytes become rows of text columns; rows that cannot be read are told, never guessed."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from models.settings import InputError
from pipelines.locate import telling_read_errors
from pipelines.preparing.cells import as_text, is_unicode, mended, plain, shown
from pipelines.preparing.data import DataSettings
from pipelines.preparing.formats import Source, csv_reader, delimiter_of
from pipelines.preparing.pickles import load_plain_columns
from pipelines.preparing.sieve import Sieve
from pipelines.preparing.units import Unit

csv.field_size_limit(2**31 - 1)

Record = list[Any]
_NOT_UTF8 = "not UTF-8"
_BATCH_ROWS = 2**14


class Decoded:
    """What decoding a unit gave: the rows in a sieve, and how many rows and lines the unit has."""

    def __init__(self, sieve: Sieve, rows: int, lines: int) -> None:
        self.sieve = sieve
        self.rows = rows
        self.lines = lines


def decode(unit: Unit, settings: DataSettings) -> Decoded:
    """Reads a unit. Its table has `position`, `line` and the columns that the recipe uses (see `internal_name`);
    all are strings, but lists of strings where the source has lists.

    Raises:
        InputError: the source cannot be read, or its text column holds no text.
    """
    if unit.source.format in ("parquet", "datasets"):
        return _from_table(unit, _read_rows(unit, settings), settings)
    if unit.source.format == "pickle":
        columns = load_plain_columns(UPath(unit.source.path))
        names = settings.used_columns
        cells = zip(*(columns[name] for name in names), strict=True)
        rows = (dict(zip(names, row, strict=True)) for row in cells)
        return _sorted_out(unit, ((number, *_record(row, settings)) for number, row in enumerate(rows)), settings)
    with unit.source.open() as stream:
        stream.seek(unit.start)
        content = stream.read(unit.stop - unit.start)
    errors = "surrogateescape" if settings.undecodable == "reject" else "replace"
    text = content.decode("utf-8", errors)
    if unit.start == 0:
        text = text.removeprefix("\ufeff")
    readers: dict[str, Callable[[str, Source, DataSettings], Iterable[_Read]]] = {
        "csv": _csv_records,
        "tsv": _csv_records,
        "jsonl": _json_records,
        "text": _text_records,
    }
    decoded = _sorted_out(unit, readers[unit.source.format](text, unit.source, settings), settings)
    decoded.lines = content.count(b"\n")
    return decoded


_Read = tuple[int, Any, str]
"""A line, the record (or its text, when it is bad) and why it is bad."""


def _sorted_out(unit: Unit, records: Iterable[_Read], settings: DataSettings) -> Decoded:
    good, bad = [], []
    position = -1
    for position, (line, record, reason) in enumerate(records):
        if reason:
            bad.append((line, reason, record))
        else:
            good.append((position, line, record))
    return _from_records(unit, good, bad, position + 1, position + 1, settings)


def _record(cells: Mapping[str, Any], settings: DataSettings) -> tuple[Any, str]:
    """The cells that the recipe uses, as text; or what is shown of a row without a text, and why it has none."""
    for name in settings.text_columns:
        if isinstance(cells.get(name), list | tuple | dict):
            content = json.dumps(cells[name], ensure_ascii=False, default=plain)
            return content, f"{name} holds a list or an object, not a text"
    return [plain(cells.get(name)) for name in settings.used_columns], ""


def _csv_records(text: str, source: Source, settings: DataSettings) -> Iterable[_Read]:
    width = len(source.columns)
    indices = [source.columns.index(name) for name in settings.used_columns]
    reader = csv_reader(io.StringIO(text, newline=""), source.format, settings.quotes)
    line = 0
    for record in reader:
        if len(record) == width:
            yield line, [record[index] for index in indices], ""
        elif record:
            content = delimiter_of(source.format).join(record)
            yield line, content, f"{len(record)} fields where the header has {width}"
        line = reader.line_num


def _json_records(text: str, source: Source, settings: DataSettings) -> Iterable[_Read]:
    for line, content in enumerate(text.split("\n")):
        if not content.strip():
            continue
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            yield line, content, f"broken JSON: {error}"
            continue
        if isinstance(value, dict):
            yield line, *_record(value, settings)
        else:
            yield line, content, "not a JSON object"


def _text_records(text: str, source: Source, settings: DataSettings) -> Iterable[_Read]:
    width = len(settings.used_columns)
    lines = text.split("\n")
    for line, content in enumerate(lines[:-1] if lines[-1] == "" else lines):
        yield line, [content.removesuffix("\r")] * width, ""


def _from_records(
    unit: Unit, good: list[tuple[int, int, Record]], bad: list[Any], rows: int, lines: int, settings: DataSettings
) -> Decoded:
    names = settings.used_columns
    positions, numbers, records = zip(*good, strict=True) if good else ((), (), ())
    columns = list(zip(*records, strict=True)) if records else [()] * len(names)
    try:
        arrays = [_column(cells) for cells in columns]
    except UnicodeEncodeError:  # surrogates: bytes that are not UTF-8, or half a pair in a JSON escape
        whole = []
        for item in good:
            if is_unicode(item[2]):
                whole.append(item)
            elif settings.undecodable == "replace":
                whole.append((item[0], item[1], mended(item[2])))
            else:
                bad.append((item[1], _NOT_UTF8, shown(item[2][0])))
        return _from_records(unit, whole, bad, rows, lines, settings)
    table = pa.table(
        {"position": pa.array(positions, pa.int64()), "line": pa.array(numbers, pa.int64())}
        | dict(zip([internal_name(name, settings) for name in names], arrays, strict=True))
    )
    sieve = Sieve(table, unit.source.path)
    if bad:
        bad.sort(key=lambda item: item[0])
        bad_lines = pa.array([item[0] for item in bad], pa.int64())
        sieve.reject("decode", bad_lines, [shown(item[1]) for item in bad], [shown(item[2]) for item in bad])
    return Decoded(sieve, rows, lines)


def internal_name(column: str, settings: DataSettings) -> str:
    """A source column's name while in work: the text's is `text`, others are prefixed so that none can clash."""
    return "text" if column == settings.text else f"source:{column}"


def _column(cells: tuple[Any, ...]) -> pa.Array:
    if any(isinstance(cell, list) for cell in cells):
        listed = [cell if cell is None or isinstance(cell, list) else [cell] for cell in cells]
        return pa.array(listed, pa.list_(pa.string()))
    return pa.array(cells, pa.string())


def _read_rows(unit: Unit, settings: DataSettings) -> pa.Table:
    """Rows `start` to `stop` of a source that is a table."""
    names = list(settings.used_columns)
    if unit.source.format == "datasets":
        import datasets

        with telling_read_errors(unit.source.path):
            data = datasets.load_from_disk(unit.source.path).select_columns(names).with_format("arrow")
            return data[unit.start : unit.stop]
    with unit.source.open() as stream:
        # Neither is a row group held whole (as by pre_buffer), nor a batch of it larger than the unit.
        file = pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False)
        most = min(unit.stop - unit.start, _BATCH_ROWS)
        pieces, first = [], 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            start, stop = max(unit.start - first, 0), min(unit.stop - first, rows)
            if start < stop:
                seen = 0
                for batch in file.iter_batches(most, [group], names, use_threads=False):
                    low, high = max(start - seen, 0), min(stop - seen, len(batch))
                    if low < high:
                        pieces.append(batch.slice(low, high - low))
                    seen += len(batch)
                    if seen >= stop:
                        break
            first += rows
        return pa.Table.from_batches(pieces)


def _from_table(unit: Unit, table: pa.Table, settings: DataSettings) -> Decoded:
    rows = len(table)
    positions = pa.array(np.arange(rows))
    columns = {"position": positions, "line": pa.array(np.arange(rows) + unit.start)}
    bad = np.zeros(rows, bool)
    for name in settings.used_columns:
        kind = table[name].type
        if name in settings.text_columns and pa.types.is_nested(kind):
            raise InputError(f"{unit.source.path}: {name} holds {kind}, not text; name a column of strings.")
        cells, wrong = as_text(table[name], unit.source.class_names.get(name), f"{unit.source.path}, column {name}")
        columns[internal_name(name, settings)] = cells
        if settings.undecodable == "reject":
            bad |= wrong
    sieve = Sieve(pa.table(columns), unit.source.path)
    sieve.drop("decode", bad, _NOT_UTF8)
    return Decoded(sieve, rows, 0)
