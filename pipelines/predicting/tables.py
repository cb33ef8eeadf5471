"""Tables whose columns were typed apart, brought to one schema."""

import json
import uuid
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cluster.store import is_local
from models.settings import InputError


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
                try:
                    column = column.cast(entry.type)
                except pa.ArrowInvalid as error:
                    raise InputError(
                        f"the column {entry.name} is {column.type} in one place and {entry.type} in another, and does "
                        f"not fit: {error}; give it one type."
                    ) from error
        columns.append(column)
    return pa.table(columns, schema=schema)


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
