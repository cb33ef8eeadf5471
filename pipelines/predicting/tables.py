"""Tables whose columns were typed apart, brought to one schema."""

import uuid
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cluster.store import is_local
from models.settings import InputError
from pipelines.preparing import cells


def as_text(value: object) -> str | None:
    """A value of any type as text, spelled as in `prepare`, lists and objects as JSON; U+FFFD where it is no UTF-8."""
    text: str | None = cells.mended(cells.spelled(value))
    return text


def texts_of(column: pa.ChunkedArray) -> list[str | None]:
    """A column's values, each as `as_text` spells it."""
    return [as_text(value) for value in column.to_pylist(maps_as_pydicts="lossy")]


def unified_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema for tables whose columns were typed apart: wider types where types differ, else text."""
    types: dict[str, dict[pa.DataType, None]] = {}
    for schema in schemas:
        for entry in schema:
            types.setdefault(entry.name, {})[entry.type] = None
    return pa.schema([(name, _common(list(kinds))) for name, kinds in types.items()])


def _common(kinds: list[pa.DataType]) -> pa.DataType:
    if len(kinds) == 1:
        return kinds[0]
    try:
        alone = [pa.schema([("", kind)]) for kind in kinds]
        common = pa.unify_schemas(alone, promote_options="permissive").field(0).type
        for kind in kinds:  # Not all that can be unified can be cast: objects with keys that must be there cannot.
            pa.nulls(1, kind).cast(common)
    except pa.ArrowException:
        return pa.string()
    return common


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
                column = pa.array(texts_of(column), pa.string())
            else:
                try:
                    column = column.cast(entry.type)
                except pa.ArrowException as error:
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
