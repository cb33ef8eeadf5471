"""Step decode: a unit's bytes become rows of text columns; rows that cannot be read are told, never guessed."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from pipelines.preparing.data import DataSettings
from pipelines.preparing.formats import Source, csv_reader, delimiter_of
from pipelines.preparing.pickles import load_plain_columns
from pipelines.preparing.sieve import Sieve, whole
from pipelines.preparing.units import Unit

csv.field_size_limit(2**31 - 1)

Record = list[Any]
_NOT_UTF8 = "not UTF-8"


class Decoded:
    """What decoding a unit gave: the rows in a sieve, and how many rows and lines the unit has."""

    def __init__(self, sieve: Sieve, rows: int, lines: int) -> None:
        self.sieve = sieve
        self.rows = rows
        self.lines = lines


def decode(unit: Unit, settings: DataSettings) -> Decoded:
    """Reads a unit. Its table has `position`, `line` and the columns that the recipe uses (see `internal_name`);
    all are strings, but lists of strings where a multi-label column holds lists.
    """
    if unit.source.format in ("parquet", "datasets"):
        return _from_table(unit, _read_rows(unit, settings), settings)
    if unit.source.format == "pickle":
        columns = load_plain_columns(UPath(unit.source.path))
        records = list(zip(*(columns[name] for name in settings.used_columns), strict=True))
        good = [(number, number, [plain(cell) for cell in record]) for number, record in enumerate(records)]
        return _from_records(unit, good, [], len(records), len(records), settings)
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
    good, bad = [], []
    position = -1
    for position, (line, record, reason) in enumerate(readers[unit.source.format](text, unit.source, settings)):
        if reason:
            bad.append((line, reason, record))
        else:
            good.append((position, line, record))
    lines = content.count(b"\n")
    return _from_records(unit, good, bad, position + 1, lines, settings)


_Read = tuple[int, Any, str]
"""A line, the record (or its text, when it is bad) and why it is bad."""


def _csv_records(text: str, source: Source, settings: DataSettings) -> Iterable[_Read]:
    width = len(source.columns)
    indices = [source.columns.index(name) for name in settings.used_columns]
    reader = csv_reader(io.StringIO(text, newline=""), source.format, settings.quotes)
    line = 0
    for record in reader:
        if len(record) == width:
            yield line, [record[index] for index in indices], ""
        elif record:
            shown = delimiter_of(source.format).join(record)
            yield line, shown, f"{len(record)} fields where the header has {width}"
        line = reader.line_num


def _json_records(text: str, source: Source, settings: DataSettings) -> Iterable[_Read]:
    names = settings.used_columns
    for line, content in enumerate(text.split("\n")):
        if not content.strip():
            continue
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            yield line, content, f"broken JSON: {error}"
            continue
        if isinstance(value, dict):
            yield line, [plain(value.get(name)) for name in names], ""
        else:
            yield line, content, "not a JSON object"


def _text_records(text: str, source: Source, settings: DataSettings) -> Iterable[_Read]:
    width = len(settings.used_columns)
    lines = text.split("\n")
    for line, content in enumerate(lines[:-1] if lines[-1] == "" else lines):
        yield line, [content.removesuffix("\r")] * width, ""


def plain(value: Any) -> Any:
    """A cell as text (or a list of texts), the same for every format: true, 3, 0.5; None where it is missing."""
    match value:
        case None | str():
            return value
        case bool():
            return "true" if value else "false"
        case float():
            return None if value != value else str(int(value)) if value.is_integer() else repr(value)
        case list() | tuple():
            return [text for item in value if (text := plain(item)) is not None]
        case dict():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return str(value)


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
            if _is_unicode(item[2]):
                whole.append(item)
            else:
                bad.append((item[1], _NOT_UTF8, _shown(item[2][0])))
        return _from_records(unit, whole, bad, rows, lines, settings)
    table = pa.table(
        {"position": pa.array(positions, pa.int64()), "line": pa.array(numbers, pa.int64())}
        | dict(zip([internal_name(name, settings) for name in names], arrays, strict=True))
    )
    sieve = Sieve(table, unit.source.path)
    if bad:
        bad.sort(key=lambda item: item[0])
        bad_lines = pa.array([item[0] for item in bad], pa.int64())
        sieve.reject("decode", bad_lines, [_shown(item[1]) for item in bad], [_shown(item[2]) for item in bad])
    return Decoded(sieve, rows, lines)


def internal_name(column: str, settings: DataSettings) -> str:
    """A source column's name while in work: the text's is `text`, others are prefixed so that none can clash."""
    return "text" if column == settings.text else f"source:{column}"


def _column(cells: tuple[Any, ...]) -> pa.Array:
    if any(isinstance(cell, list) for cell in cells):
        listed = [cell if cell is None or isinstance(cell, list) else [cell] for cell in cells]
        return pa.array(listed, pa.list_(pa.string()))
    return pa.array(cells, pa.string())


def _is_unicode(cells: Record) -> bool:
    try:
        json.dumps(cells, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: Any) -> str:
    return str(text).encode("utf-8", "replace").decode()


def _read_rows(unit: Unit, settings: DataSettings) -> pa.Table:
    """Rows `start` to `stop` of a source that is a table."""
    names = list(settings.used_columns)
    if unit.source.format == "datasets":
        import datasets

        data = datasets.load_from_disk(unit.source.path).select_columns(names).with_format("arrow")
        return data[unit.start : unit.stop]
    with unit.source.open() as stream:
        file = pq.ParquetFile(stream)
        pieces, first = [], 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            start, stop = max(unit.start - first, 0), min(unit.stop - first, rows)
            if start < stop:
                seen = 0
                for batch in file.iter_batches(row_groups=[group], columns=names, use_threads=False):
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
    for name in settings.used_columns:
        columns[internal_name(name, settings)] = _as_text(table[name], unit.source.class_names.get(name))
    return Decoded(Sieve(pa.table(columns), unit.source.path), rows, 0)


def _as_text(column: Any, class_names: list[str] | None) -> Any:
    """An Arrow column as strings, or lists of strings, spelled as `plain` does."""
    column = whole(column)
    kind = column.type
    if pa.types.is_string(kind):
        return column
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        cells = [plain(_named(cell, class_names)) for cell in column.to_pylist()]
        return pa.array(cells, pa.list_(pa.string()))
    if class_names:
        indices = pc.if_else(pc.less(column, 0), None, column)
        return pc.take(pa.array(class_names, pa.string()), indices)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_large_string(kind):
        return pc.cast(column, pa.string())
    return pa.array([plain(cell) for cell in column.to_pylist()], pa.string())


def _named(cell: Any, class_names: list[str] | None) -> Any:
    return [class_names[item] for item in cell] if class_names and cell is not None else cell
