"""The files to predict as small tables with all their columns, in order.

Where `prepare` sets an unusable row aside, a prediction must not lose one: a row whose text is not UTF-8 (but not
where `undecodable` is `replace`), or is a list or an object, keeps its place and is told, to stay without an answer; a
row that cannot be read at all ends the reading with its line. In the tables, bytes that are no UTF-8 are U+FFFD.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from models.settings import InputError
from pipelines.locate import reason_of
from pipelines.predicting.tables import as_text
from pipelines.preparing import cells
from pipelines.preparing.data import DataSettings
from pipelines.preparing.formats import Source, csv_reader
from pipelines.preparing.pickles import load_plain_columns

T = TypeVar("T")

_LONGEST_FIELD = 2**30
_UNREADABLE, _TEXTLESS = b"shoal.unreadable", b"shoal.textless"


def read_tables(source: Source, settings: DataSettings, rows: int) -> Iterator[pa.Table]:
    """The file's rows, `rows` in a table, the last of which may be shorter. Fields of csv and tsv stay text.

    Raises:
        InputError: a row cannot be read; names the file and the line.
    """
    texts = settings.text_columns
    match source.format:
        case "csv" | "tsv":
            for records in _batches(_records(source, settings), rows):
                yield _table(dict(zip(source.columns, zip(*records, strict=True), strict=True)), settings)
        case "jsonl":
            for objects in _batches(_objects(source, settings), rows):
                names = dict.fromkeys(key for value in objects for key in value)
                yield _table({name: [value.get(name) for value in objects] for name in names}, settings)
        case "text":
            for lines in _batches((line for _, line in _lines(source, settings)), rows):
                yield _table({"text": lines}, settings)
        case "parquet":
            yield from _parquet_tables(source, settings, texts, rows)
        case "pickle":
            columns = load_plain_columns(UPath(source.path))
            for start in range(0, source.rows, rows):
                yield _table({name: values[start : start + rows] for name, values in columns.items()}, settings)
        case _:
            import datasets

            data = datasets.load_from_disk(source.path).with_format("arrow")
            for start in range(0, len(data), rows):
                yield _with_text(data[start : start + rows], source, settings, texts)


def unreadable_rows(table: pa.Table) -> list[int]:
    """The rows of a table from `read_tables` whose text is not UTF-8."""
    return _told(table, _UNREADABLE)


def textless_rows(table: pa.Table) -> list[int]:
    """The rows of a table from `read_tables` that have a list or an object where a text should be."""
    return _told(table, _TEXTLESS)


def _told(table: pa.Table, key: bytes) -> list[int]:
    rows: list[int] = json.loads((table.schema.metadata or {}).get(key, b"[]"))
    return rows


def _telling(table: pa.Table, unreadable: Iterable[int], textless: Iterable[int] = ()) -> pa.Table:
    told = {_UNREADABLE: set(unreadable) - set(textless), _TEXTLESS: set(textless)}
    return table.replace_schema_metadata({key: json.dumps(sorted(rows)) for key, rows in told.items()})


def _table(columns: Mapping[str, Sequence[Any]], settings: DataSettings) -> pa.Table:
    given = {name: columns[name] for name in settings.text_columns if name in columns}
    textless = _rows_where(given, lambda value: isinstance(value, list | tuple | dict))
    texts = {name: [cells.spelled(value) for value in values] for name, values in given.items()}
    unreadable = []
    try:
        typed = {name: _typed(values, name in texts) for name, values in {**columns, **texts}.items()}
    except UnicodeEncodeError:  # Surrogates: bytes that are not UTF-8, or half a pair in a JSON escape.
        if settings.undecodable == "reject":
            unreadable = _rows_where(texts, lambda text: cells.mended(text) != text)
        mended = {cells.mended(name): cells.mended(values) for name, values in {**columns, **texts}.items()}
        typed = {name: _typed(values, name in texts) for name, values in mended.items()}
    return _telling(pa.table(typed), unreadable, textless)


def _rows_where(columns: Mapping[str, Sequence[Any]], holds: Callable[[Any], bool]) -> list[int]:
    return [row for values in columns.values() for row, value in enumerate(values) if holds(value)]


def _typed(values: Sequence[Any], is_text: bool) -> pa.Array:
    if is_text:
        return pa.array(values, pa.string())
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        array = None  # Values of several types.
    if array is not None and not _is_hollow(array.type):  # Parquet cannot hold objects without keys.
        return array
    return pa.array([as_text(value) for value in values], pa.string())


def _is_hollow(kind: pa.DataType) -> bool:
    """Whether there is an object without keys in it."""
    inner = [kind.field(position).type for position in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not inner) or any(map(_is_hollow, inner))


def _errors(settings: DataSettings) -> str:
    return "surrogateescape" if settings.undecodable == "reject" else "replace"


def _lines(source: Source, settings: DataSettings) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, from 1."""
    with source.open() as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", _errors(settings), newline="\n")
        for number, line in enumerate(text, start=1):
            yield number, line.rstrip("\r\n")


def _records(source: Source, settings: DataSettings) -> Iterator[list[str]]:
    csv.field_size_limit(_LONGEST_FIELD)
    before, ended = source.header_lines, 0
    with source.open() as stream:
        stream.seek(source.header_bytes)

        def lines() -> Iterator[str]:
            yield from io.TextIOWrapper(stream, "utf-8", _errors(settings), newline="")
            if reader.line_num > ended:
                raise InputError(
                    f"{source.path}, line {before + ended + 1}: a quote opens in this row and is never closed; if "
                    "quotes are plain characters there, add --no-quotes."
                )

        reader = csv_reader(lines(), source.format, settings.quotes)
        try:
            for record in reader:
                if record and len(record) != len(source.columns):
                    raise InputError(
                        f"{source.path}, line {before + reader.line_num}: {len(record)} fields where the header names "
                        f"{len(source.columns)}."
                    )
                if record:
                    yield record
                ended = reader.line_num
        except csv.Error as error:
            raise InputError(f"{source.path}, line {before + reader.line_num}: {error}.") from error


def _objects(source: Source, settings: DataSettings) -> Iterator[dict[str, Any]]:
    for number, line in _lines(source, settings):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source.path}, line {number}: no JSON: {error}.") from error
        if not isinstance(value, dict):
            raise InputError(f"{source.path}, line {number}: a JSON object is needed, not {line.strip()[:40]}.")
        yield value


def _parquet_tables(source: Source, settings: DataSettings, texts: Sequence[str], rows: int) -> Iterator[pa.Table]:
    read = 0
    with source.open() as stream:
        try:
            for batch in pq.ParquetFile(stream, pre_buffer=False).iter_batches(batch_size=rows):
                table = _with_text(pa.Table.from_batches([batch]), source, settings, texts)
                table.validate(full=True)
                yield table
                read += len(table)
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):
                raise  # The place, not the content.
            raise InputError(f"{source.path} is damaged after row {read:,}: {reason_of(error)}.") from error


def _with_text(table: pa.Table, source: Source, settings: DataSettings, texts: Sequence[str]) -> pa.Table:
    """The table with its strings, and the bytes of its text, as UTF-8."""
    unreadable: set[int] = set()
    for index, name in enumerate(table.column_names):
        column, kind = table.column(index), table.schema.types[index]
        if name in texts and pa.types.is_nested(kind):
            raise InputError(f"{source.path}: {name} holds {kind}, not text; name a column of strings.")
        if name in texts or (cells.holds_strings(kind) and not _is_utf8(column)):
            mended, wrong = cells.as_text(column, None)
            if name in texts and settings.undecodable == "reject":
                unreadable |= set(np.flatnonzero(wrong).tolist())
            table = table.set_column(index, name, mended)
    return _telling(table, unreadable)


def _is_utf8(column: pa.ChunkedArray) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
