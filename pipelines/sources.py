"""Labelled text where it lies: the settings that name it, and the files they lead to."""

import csv
import hashlib
import io
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import Field, field_validator
from upath import UPath

from models.settings import InputError, Settings
from pipelines.locate import identity, locate
from pipelines.pickles import load_plain_columns
from pipelines.prepared import SPLITS

Format = Literal["auto", "csv", "tsv", "jsonl", "parquet", "text", "datasets", "pickle"]

HUB = "hub://"
_FORMATS = {
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
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_HEAD = 2**20


class LabelSettings(Settings):
    """One column to predict."""

    column: str = Field(description="The column's name in the source.")
    multi: bool = Field(False, description="Whether a text may have any number of the classes.")
    separator: str = Field(",", description="What stands between a multi-label cell's classes, in text formats.")
    classes: tuple[str, ...] | None = Field(
        None, description="The known classes; a row with another is rejected. By default, all that occur."
    )
    names: dict[str, str] = Field({}, description="New names for values, for example {'0': negative, '1': positive}.")


class DataSettings(Settings):
    """Where the text and its labels are."""

    source: str | tuple[str, ...] | dict[str, str | tuple[str, ...]] = Field(
        description="A path, glob, URL, `hub://OWNER/NAME` (`@REVISION` pins it) or `package://NAME/PATH`, a list of "
        "them, or a mapping of train, validation and test to them where the split is given."
    )
    format: Format = Field("auto", description="How the files are written; by default, told by their names.")
    text: str = Field("text", description="The column with the text.")
    text_pair: str | None = Field(None, description="The column with the second text, for pairs.")
    labels: tuple[LabelSettings, ...] = Field((), description="The columns to predict; a bare name will do.")
    columns: tuple[str, ...] = Field((), description="Further columns to keep, for slices in the evaluation.")
    where: dict[str, str] = Field(
        {}, description="Keeps only rows whose column matches (anywhere) a regular expression."
    )
    skip_rows: int = Field(0, ge=0, description="Lines to skip after the header of csv and tsv files.")
    quotes: bool = Field(True, description='Whether fields of csv and tsv files may be quoted with ".')
    undecodable: Literal["reject", "replace"] = Field(
        "reject", description="What becomes of rows that are not UTF-8: rejected, or the wrong bytes replaced (U+FFFD)."
    )
    split: str | None = Field(None, description="The column that names each row's split, where the data has one.")

    @field_validator("labels", mode="before")
    @classmethod
    def _bare_names(cls, value: object) -> object:
        if isinstance(value, str | dict):
            value = (value,)
        if isinstance(value, list | tuple):
            return tuple({"column": item} if isinstance(item, str) else item for item in value)
        return value

    @property
    def used_columns(self) -> tuple[str, ...]:
        """The columns that are read, each once."""
        pair = [self.text_pair] if self.text_pair else []
        split = [self.split] if self.split else []
        labels = [label.column for label in self.labels]
        return tuple(dict.fromkeys([self.text, *pair, *labels, *self.columns, *self.where, *split]))


@dataclass(frozen=True)
class Source:
    """One file (or folder saved by `datasets`) to read, and what was learned by looking at its beginning."""

    path: str
    format: str
    size: int
    """Bytes."""
    split: str | None = None
    """The split that the recipe gives it."""
    columns: tuple[str, ...] = ()
    rows: int = 0
    """For formats that tell: parquet, datasets, pickle."""
    header_bytes: int = 0
    header_lines: int = 0
    class_names: dict[str, list[str]] = field(default_factory=dict)
    """Names of integer classes, where the file records them (the ClassLabel of `datasets`)."""

    def open(self) -> Any:
        """The file's bytes.

        Raises:
            InputError: it cannot be read on this node.
        """
        path = UPath(self.path)
        try:
            return path.fs.open(path.path, "rb")
        except OSError as error:
            raise InputError(f"{self.path} cannot be read on the node {platform.node()}: {error}.") from error


def split_name(value: str) -> str | None:
    """train, validation or test for any of their usual spellings, else None."""
    return _SPLIT_NAMES.get(value.strip().lower())


def references(settings: DataSettings) -> list[tuple[str | None, str]]:
    """What the recipe names as sources, each with its given split.

    Raises:
        InputError: the mapping has another key than a split's name, or no training data.
    """
    source = settings.source
    if not isinstance(source, dict):
        return [(None, reference) for reference in _listed(source)]
    if unknown := [key for key in source if split_name(key) is None]:
        raise InputError(f"data.source: {unknown[0]!r} is no split; there are {', '.join(SPLITS)}.")
    if "train" not in map(split_name, source):
        raise InputError("data.source: the mapping needs an entry for train.")
    return [(split_name(key), reference) for key, listed in source.items() for reference in _listed(listed)]


def sources_identity(settings: DataSettings) -> str:
    """A digest of all source data; of a hub dataset, its id and revision.

    Raises:
        InputError: a file is missing.
    """
    parts = []
    for split, reference in references(settings):
        if reference.startswith(HUB):
            from pipelines.hub import hub_identity  # imports `datasets`, which takes a second

            parts.append((split, hub_identity(reference)))
        else:
            parts.append((split, identity(_expand(reference))))
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def find_sources(settings: DataSettings, fetched: UPath) -> list[Source]:
    """Every file to read, in order, looked at so that a wrong column or format is told before anything runs.

    Hub datasets are first written as Parquet files below `fetched`, where all nodes can read them.

    Raises:
        InputError: a file is missing, empty, of an unknown format, or lacks a column that the recipe uses.
    """
    found: list[Source] = []
    for position, (split, reference) in enumerate(references(settings)):
        if reference.startswith(HUB):
            from pipelines.hub import fetch

            pairs = fetch(reference, split, fetched / f"{position:03d}")
            found += [_parquet(path, given) for given, path in pairs]
            continue
        for path in _expand(reference):
            found += _look(path, settings, split)
    for source in found:
        _check_columns(source, settings)
    if not any(source.rows or source.size for source in found):
        raise InputError(f"{found[0].path} is empty.")
    return found


def _listed(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _expand(reference: str) -> list[UPath]:
    """The files that a reference stands for: one, those a glob matches, or those in a folder."""
    if any(sign in reference for sign in "*?["):
        position = min(reference.index(sign) for sign in "*?[" if sign in reference)
        base, _, _ = reference[:position].rpartition("/")
        pattern = reference[len(base) + 1 :] if base else reference
        if base.startswith("package://"):
            base += "/."
        folder = locate(base or ("/" if reference.startswith("/") else "."))
        files = sorted((path for path in folder.glob(pattern) if path.is_file()), key=str)
        if not files:
            raise InputError(f"{reference} matches no file (looked in {folder}).")
        return files
    path = locate(reference)
    if not path.is_dir() or _saved_by_datasets(path):
        return [path]
    files = sorted((entry for entry in path.iterdir() if entry.suffix.lower() in _FORMATS), key=str)
    if not files:
        known = ", ".join(dict.fromkeys(_FORMATS.values()))
        raise InputError(f"{reference} is a folder without data files; known forms are {known}.")
    return files


def _saved_by_datasets(path: UPath) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _look(path: UPath, settings: DataSettings, split: str | None) -> list[Source]:
    kind = settings.format
    if kind == "auto":
        kind = "datasets" if path.is_dir() else _FORMATS.get(path.suffix.lower(), "unknown")  # type: ignore[assignment]
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
            return [_parquet(path, split)]
        case "pickle":
            columns = load_plain_columns(path)
            rows = len(next(iter(columns.values()), []))
            return [Source(str(path), kind, size, split, tuple(columns), rows)]
    known = ", ".join(dict.fromkeys(_FORMATS.values()))
    raise InputError(f"{path}: its name does not tell the format; set data.format to one of {known}.")


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


def _parquet(path: UPath, split: str | None) -> Source:
    try:
        with path.fs.open(path.path, "rb") as stream:
            file = pq.ParquetFile(stream)
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}.") from error
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    size = int(path.stat().st_size)
    return Source(str(path), "parquet", size, split, tuple(schema.names), rows, class_names=class_names(features))


def _datasets(path: UPath, split: str | None) -> list[Source]:
    import datasets

    if (path / "dataset_dict.json").exists():
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split is None and len(names) > 1 and any(split_name(name) is None for name in names):
            raise InputError(
                f"{path} has the splits {', '.join(names)}; map them to {', '.join(SPLITS)} in data.source."
            )
        given = {name: split or (split_name(name) if len(names) > 1 else None) for name in names}
        return [source for name in names for source in _datasets(path / name, given[name])]
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


def _check_columns(source: Source, settings: DataSettings) -> None:
    for column in settings.used_columns:
        if column not in source.columns:
            close = get_close_matches(column, source.columns, n=1)
            meant = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(source.columns)}."
            raise InputError(f"{source.path} has no column {column!r}; {meant}")
