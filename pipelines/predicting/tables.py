"""A source file as consecutive small tables with all its columns, in order: what batch inference reads.

Where `prepare` sets an unusable row aside, a prediction must not lose one: a row that cannot be read ends the
reading with its line. Bytes that are no UTF-8 become U+FFFD.
"""

import csv
import io
import json
import uuid
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cluster.store import is_local
from models.settings import InputError
from pipelines.preparing.formats import Source, delimiter_of
from pipelines.preparing.pickles import load_plain_columns

T = TypeVar("T")

_LONGEST_FIELD = 2**30


def read_tables(source: Source, rows: int) -> Iterator[pa.Table]:
    """The file's rows, `rows` in a table, the last of which may be shorter. Fields of csv and tsv stay text.

    Raises:
        InputError: a row cannot be read; names the file and the line.
    """
    match source.format:
        case "csv" | "tsv":
            for records in _batches(_records(source), rows):
                cells = zip(*records, strict=True)
                arrays = [pa.array(cell, pa.string()) for cell in cells]
                yield pa.Table.from_arrays(arrays, names=list(source.columns))
        case "jsonl":
            for objects in _batches(_objects(source), rows):
                yield _table_of_objects(objects)
        case "text":
            for lines in _batches(_lines(source), rows):
                yield pa.table({"text": pa.array(lines, pa.string())})
        case "parquet":
            with source.open() as stream:
                for batch in pq.ParquetFile(stream).iter_batches(batch_size=rows):
                    yield pa.Table.from_batches([batch])
        case _:
            table = _whole(source)
            for start in range(0, len(table), rows):
                yield table.slice(start, rows)


def _lines(source: Source) -> Iterator[str]:
    with source.open() as stream:
        for line in io.TextIOWrapper(stream, "utf-8-sig", "replace", newline="\n"):
            yield line.rstrip("\r\n")


def _records(source: Source) -> Iterator[list[str]]:
    csv.field_size_limit(_LONGEST_FIELD)
    with source.open() as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", "replace", newline="")
        reader = csv.reader(text, delimiter=delimiter_of(source.format), strict=True)
        try:
            next(reader)
            for record in reader:
                if not record:
                    continue
                if len(record) != len(source.columns):
                    raise InputError(
                        f"{source.path}, line {reader.line_num}: {len(record)} fields where the header names "
                        f"{len(source.columns)}."
                    )
                yield record
        except csv.Error as error:
            raise InputError(f"{source.path}, line {reader.line_num}: {error}.") from error


def _objects(source: Source) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(source), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{source.path}, line {number}: no JSON: {error}.") from error
        if not isinstance(value, dict):
            raise InputError(f"{source.path}, line {number}: a JSON object is needed, not {line.strip()[:40]}.")
        yield value


def _table_of_objects(objects: list[dict[str, Any]]) -> pa.Table:
    columns = {}
    for name in dict.fromkeys(key for value in objects for key in value):
        values = [value.get(name) for value in objects]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            # Values of several types: as they stand in the file.
            columns[name] = pa.array([as_text(value) for value in values], pa.string())
    return pa.table(columns)


def as_text(value: object) -> str | None:
    """A value of any type as text: strings as they are, all else as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def unified_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema for tables whose columns were typed apart: wider types where types differ, else text."""
    types: dict[str, pa.DataType] = {}
    for schema in schemas:
        for entry in schema:
            known = types.get(entry.name, entry.type)
            if known != entry.type:
                try:
                    pair = [pa.schema([(entry.name, known)]), pa.schema([entry])]
                    known = pa.unify_schemas(pair, promote_options="permissive").field(0).type
                except (pa.ArrowInvalid, pa.ArrowTypeError):
                    known = pa.string()
            types[entry.name] = known
    return pa.schema(list(types.items()))


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the schema's columns in its order and types; null where it has none."""
    columns = []
    for entry in schema:
        if entry.name not in table.column_names:
            columns.append(pa.nulls(len(table), entry.type))
            continue
        column = table[entry.name]
        if column.type != entry.type:
            if pa.types.is_string(entry.type):
                column = pa.array([as_text(value) for value in column.to_pylist()], pa.string())
            else:
                column = column.cast(entry.type)
        columns.append(column)
    return pa.table(columns, schema=schema)


def read_schema(path: UPath) -> pa.Schema:
    """The schema of a Parquet file."""
    with path.fs.open(path.path, "rb") as stream:
        return pq.read_schema(stream)


def write_parquet(table: pa.Table, path: UPath) -> None:
    """Writes a Parquet file that appears whole or not at all."""
    if not is_local(path):
        # Objects do so anyway, if they are sent in one piece.
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        path.write_bytes(sink.getvalue().to_pybytes())
        return
    local = Path(path.path)
    partial = local.with_name(f".{local.name}.{uuid.uuid4().hex}")
    pq.write_table(table, partial)
    partial.replace(local)


def _whole(source: Source) -> pa.Table:
    if source.format == "pickle":
        return pa.table(load_plain_columns(UPath(source.path)))
    import datasets

    return datasets.load_from_disk(source.path).with_format("arrow")[:]


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch
