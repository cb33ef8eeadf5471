"""The files to predict as small tables with all their columns, in order, by the recipe's reading rules.

A file's name tells its format, but `data.format` does where the recipe's own files end alike or the name tells none.
Quotes, skipped lines and what becomes of bytes that are no UTF-8 are as the recipe says for files of the recipe's own
format, else as is usual.

Where `prepare` sets an unusable row aside, a prediction must not lose one: a row whose text is not UTF-8 keeps its
place and is told, to stay without an answer (but not where `data.undecodable` is `replace`); a row that cannot be
read at all ends the reading with its line. In the tables, bytes that are no UTF-8 are U+FFFD.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from models.settings import InputError
from pipelines.predicting.tables import as_text
from pipelines.preparing import cells
from pipelines.preparing.data import DataSettings
from pipelines.preparing.formats import EXTENSIONS, Source, csv_reader, format_of, look
from pipelines.preparing.pickles import load_plain_columns
from pipelines.preparing.sources import HUB, check_columns, expand, find_sources, references, sources_identity

T = TypeVar("T")
Given = tuple[Source, DataSettings]
"""A file to predict, and how it is read."""

_LONGEST_FIELD = 2**30
_RULES = {"skip_rows", "quotes", "undecodable"}
_UNREADABLE = b"shoal.unreadable"
_SURROGATE = re.compile("[\ud800-\udfff]")


def files_to_predict(source: str, recipe: DataSettings, fetched: UPath) -> list[Given]:
    """Every file that `source` names, looked at, and how it is read; of a hub dataset, copies below `fetched`.

    Raises:
        InputError: a file is missing, empty, of an unknown format, or lacks the column with the text.
    """
    if source.startswith(HUB):
        settings = DataSettings(source=source, text=recipe.text, text_pair=recipe.text_pair)
        return [(each, settings) for each in find_sources(settings, fetched)]
    found = []
    for path in expand(source):
        settings = _settings_for(path, recipe)
        for each in look(path, settings, None):
            check_columns(each, settings)
            found.append((each, settings))
    return found


def input_identity(source: str, recipe: DataSettings) -> list[Any]:
    """What decides the rows that are read, as JSON.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    endings = [] if source.startswith(HUB) else [path.suffix for path in expand(source)]
    content = sources_identity(DataSettings(source=source))
    own = sorted(str(each) for each in _formats_of(recipe))
    return [content, endings, own, recipe.model_dump(mode="json", include={"format", "text", "text_pair", *_RULES})]


def _settings_for(path: UPath, recipe: DataSettings) -> DataSettings:
    kind = "datasets" if path.is_dir() else _format_for(path, recipe)
    own = _formats_of(recipe)
    rules = recipe.model_dump(include=_RULES) if kind in own or None in own else {}
    text = "text" if kind == "text" else recipe.text  # Lines have no columns: each is the text.
    return DataSettings(source=str(path), format=kind, text=text, text_pair=recipe.text_pair, **rules)


def _format_for(path: UPath, recipe: DataSettings) -> str:
    alike = {PurePosixPath(reference).suffix.lower() for _, reference in references(recipe)}
    if recipe.format != "auto" and path.suffix.lower() in alike:
        return recipe.format
    return format_of(path) or recipe.format


def _formats_of(recipe: DataSettings) -> set[str | None]:
    """The formats of the recipe's own data, as far as names tell; None where one does not."""
    if recipe.format != "auto":
        return {recipe.format}
    return {EXTENSIONS.get(PurePosixPath(reference).suffix.lower()) for _, reference in references(recipe)}


def read_tables(source: Source, settings: DataSettings, rows: int) -> Iterator[pa.Table]:
    """The file's rows, `rows` in a table, the last of which may be shorter. Fields of csv and tsv stay text.

    Raises:
        InputError: a row cannot be read; names the file and the line.
    """
    texts = settings.text_columns
    match source.format:
        case "csv" | "tsv":
            for records in _batches(_records(source, settings), rows):
                yield _table(dict(zip(source.columns, zip(*records, strict=True), strict=True)), texts)
        case "jsonl":
            for objects in _batches(_objects(source, settings), rows):
                names = dict.fromkeys(key for value in objects for key in value)
                yield _table({name: [value.get(name) for value in objects] for name in names}, texts)
        case "text":
            for lines in _batches((line for _, line in _lines(source, settings)), rows):
                yield _table({"text": lines}, texts)
        case "parquet":
            yield from _parquet_tables(source, settings, texts, rows)
        case "pickle":
            columns = load_plain_columns(UPath(source.path))
            for start in range(0, source.rows, rows):
                yield _table({name: values[start : start + rows] for name, values in columns.items()}, texts)
        case _:
            import datasets

            data = datasets.load_from_disk(source.path).with_format("arrow")
            for start in range(0, len(data), rows):
                yield _with_text(data[start : start + rows], source, settings, texts)


def unreadable_rows(table: pa.Table) -> list[int]:
    """The rows of a table from `read_tables` whose text is not UTF-8."""
    told: list[int] = json.loads((table.schema.metadata or {}).get(_UNREADABLE, b"[]"))
    return told


def _table(columns: Mapping[str, Sequence[Any]], texts: Sequence[str]) -> pa.Table:
    try:
        return pa.table({name: _typed(values) for name, values in columns.items()})
    except UnicodeEncodeError:  # Surrogates: bytes that are not UTF-8, or half a pair in a JSON escape.
        rows = zip(*(columns[name] for name in texts if name in columns), strict=True)
        unreadable = [row for row, values in enumerate(rows) if _mended(values) != list(values)]
        mended = {_mended(name): _typed(_mended(values)) for name, values in columns.items()}
        return pa.table(mended).replace_schema_metadata({_UNREADABLE: json.dumps(unreadable)})


def _typed(values: Sequence[Any]) -> pa.Array:
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


def _mended(value: Any) -> Any:
    match value:
        case str():
            return _SURROGATE.sub("\ufffd", value)
        case list() | tuple():
            return [_mended(item) for item in value]
        case dict():
            return {_mended(key): _mended(item) for key, item in value.items()}
        case _:
            return value


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
                    "quotes are plain characters there, set data.quotes=false."
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
            told = next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")
            raise InputError(f"{source.path} is damaged after row {read:,}: {told}.") from error


def _with_text(table: pa.Table, source: Source, settings: DataSettings, texts: Sequence[str]) -> pa.Table:
    """The table with its strings, and the bytes of its text, as UTF-8."""
    unreadable: set[int] = set()
    for index, name in enumerate(table.column_names):
        column, kind = table.column(index), table.schema.types[index]
        if name in texts and pa.types.is_nested(kind):
            raise InputError(f"{source.path}: {name} holds {kind}, not text; name a column of strings.")
        if name in texts or ((pa.types.is_string(kind) or pa.types.is_large_string(kind)) and not _is_utf8(column)):
            mended, wrong = cells.as_text(column, None)
            if name in texts and settings.undecodable == "reject":
                unreadable |= set(np.flatnonzero(wrong).tolist())
            table = table.set_column(index, name, mended)
    return table.replace_schema_metadata({_UNREADABLE: json.dumps(sorted(unreadable))})


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
