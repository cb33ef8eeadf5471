"""One file to read: its format, its columns, where its rows begin."""

import contextlib
import csv
import io
import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import ClientError as HttpError
from botocore.exceptions import BotoCoreError, ClientError
from upath import UPath

from models.settings import InputError
from pipelines.locate import reason_of, telling_read_errors
from pipelines.preparing.data import DataSettings, splits_to_read
from pipelines.preparing.pickles import load_plain_columns

EXTENSIONS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".pkl": "pickle",
    ".pickle": "pickle",
}
"""The format that a file's name tells."""
_HEAD = 2**20
_READ_ERRORS = (OSError, ValueError, BotoCoreError, ClientError, HttpError, pa.ArrowException)


@dataclass(frozen=True)
class Source:
    """One file (or folder saved by `datasets`) to read, and what was learned by looking at its beginning."""

    path: str
    format: str
    size: int
    """Bytes; of Parquet, uncompressed: what it takes to work on it."""
    split: str | None = None
    """The split that the recipe gives it."""
    columns: tuple[str, ...] = ()
    rows: int = 0
    """For formats that tell: parquet, datasets, pickle."""
    header_bytes: int = 0
    header_lines: int = 0
    class_names: dict[str, list[str]] = field(default_factory=dict)
    """Names of integer classes, where the file records them (the ClassLabel of `datasets`)."""

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """The file's bytes, for as long as the context lasts.

        Raises:
            InputError: it cannot be read on this node, is damaged, or breaks off.
        """
        path = UPath(self.path)
        with (
            telling_read_errors(f"{self.path} (on the node {platform.node()})", _READ_ERRORS),
            path.fs.open(path.path, "rb") as stream,
        ):
            yield stream


def format_of(path: UPath) -> str | None:
    """The format that a file's name (of a web page's URL, what stands before `?`) tells."""
    name = urlsplit(str(path)).path if path.protocol in ("http", "https") else path.name
    return EXTENSIONS.get(PurePosixPath(name).suffix.lower())


def saved_by_datasets(path: UPath) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def look(path: UPath, settings: DataSettings, split: str | None) -> list[Source]:
    """A file, or each split in a folder saved by `datasets`, with what its beginning tells.

    Raises:
        InputError: it cannot be read, is empty, or not of the format that it should be.
    """
    with telling_read_errors(path, _READ_ERRORS):
        return _look(path, settings, split)


def _look(path: UPath, settings: DataSettings, split: str | None) -> list[Source]:
    kind: str | None = settings.format
    if kind == "auto":
        kind = "datasets" if path.is_dir() else format_of(path)
    if kind == "datasets":
        return _datasets(path, split)
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a {kind} file.")
    size = int(path.stat().st_size)
    if size == 0:
        raise InputError(f"{path} is empty.")
    match kind:
        case "csv" | "tsv":
            return [_separated(path, kind, size, settings, split)]
        case "jsonl":
            return [_jsonl(path, size, split)]
        case "text":
            return [Source(str(path), kind, size, split, ("text",))]
        case "parquet":
            return [look_at_parquet(path, split)]
        case "pickle":
            columns = load_plain_columns(path)
            rows = len(next(iter(columns.values()), []))
            return [Source(str(path), kind, size, split, tuple(columns), rows)]
    known = ", ".join(dict.fromkeys(EXTENSIONS.values()))
    raise InputError(
        f"{path}: its name does not tell the format; set data.format (for predict, --format) to one of {known}."
    )


def csv_reader(lines: Iterable[str], format_: str, quotes: bool) -> Any:
    """A reader of csv or tsv lines; all of Shoal reads them by these rules."""
    quoting: Literal[0, 3] = 0 if quotes else 3
    return csv.reader(lines, delimiter=delimiter_of(format_), quoting=quoting)


def delimiter_of(format_: str) -> str:
    """What stands between the fields of csv and tsv files."""
    return "\t" if format_ == "tsv" else ","


def _separated(path: UPath, kind: str, size: int, settings: DataSettings, split: str | None) -> Source:
    with path.fs.open(path.path, "rb") as stream:
        head = stream.read(_HEAD)
    bom = len(b"\xef\xbb\xbf") if head.startswith(b"\xef\xbb\xbf") else 0
    lines = io.StringIO(head[bom:].decode("utf-8", "replace"), newline="\n")
    reader = csv_reader(lines, kind, settings.quotes)
    try:
        columns = [name.strip() for name in next(reader)]
    except (StopIteration, csv.Error) as error:
        raise InputError(f"{path} has no readable header: its first line must name the columns.") from error
    header_lines = reader.line_num + settings.skip_rows
    end = bom
    for _ in range(header_lines):
        newline = head.find(b"\n", end)
        end = len(head) if newline < 0 else newline + 1
    if len(head) == _HEAD and end == len(head):
        raise InputError(f"{path} has no header: its first {_HEAD:,} bytes hold no end of a line.")
    if twice := next((name for name in columns if columns.count(name) > 1 and name in settings.used_columns), None):
        raise InputError(f"{path} names the column {twice!r} twice in its header.")
    return Source(str(path), kind, size, split, tuple(columns), 0, end, header_lines)


def _jsonl(path: UPath, size: int, split: str | None) -> Source:
    with path.fs.open(path.path, "rb") as stream:
        head = stream.read(_HEAD)
    keys: dict[str, None] = {}
    for line in head.splitlines()[:1000]:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            keys.update(dict.fromkeys(value))
    if not keys:
        raise InputError(f"{path} is not jsonl: its beginning holds no line that is a JSON object.")
    return Source(str(path), "jsonl", size, split, tuple(keys))


def look_at_parquet(path: UPath, split: str | None) -> Source:
    """A Parquet file, with what its footer tells.

    Raises:
        InputError: it is none.
    """
    try:
        with path.fs.open(path.path, "rb") as stream:
            file = pq.ParquetFile(stream, pre_buffer=False)
            schema, footer = file.schema_arrow, file.metadata
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not a Parquet file, or is damaged: {reason_of(error)}.") from error
    size = sum(footer.row_group(group).total_byte_size for group in range(footer.num_row_groups))
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = class_names(features)
    return Source(str(path), "parquet", size, split, tuple(schema.names), footer.num_rows, class_names=names)


def _datasets(path: UPath, split: str | None) -> list[Source]:
    import datasets

    if (path / "dataset_dict.json").exists():
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        wanted = splits_to_read(str(path), names, split)
        return [source for name, given in wanted.items() for source in _datasets(path / name, given)]
    if not (path / "state.json").exists():
        raise InputError(f"{path} was not saved by datasets: there is no state.json in it.")
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be loaded by datasets: {error}.") from error
    names = class_names(data.features.to_dict())
    size = sum(int(entry.stat().st_size) for entry in path.iterdir())
    return [Source(str(path), "datasets", size, split, tuple(data.column_names), len(data), class_names=names)]


def class_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """The names of integer classes by column, from the features that `datasets` records."""
    found = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            found[column] = list(inner["names"])
    return found
