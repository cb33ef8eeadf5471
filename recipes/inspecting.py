"""Looking at a data file: what its columns hold, as far as its first rows tell."""

import csv
import io
import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from upath import UPath

from models.settings import InputError

SAMPLE_ROWS = 50_000
_SAMPLE_BYTES = 64 * 2**20
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_NO_TEXT = re.compile(r"[-+\d.,:/ ]*|https?://\S+|[0-9a-fA-F-]{16,}")
_ORANGE_TYPES = {"string", "discrete", "continuous", "time", "s", "d", "c"}


@dataclass(frozen=True)
class Column:
    """A column's values in the sample, as text; lists are kept as lists of text."""

    name: str
    values: list[Any]

    @property
    def given(self) -> list[Any]:
        """The values that are not missing."""
        return [value for value in self.values if value not in (None, "", [])]

    @property
    def lists(self) -> bool:
        """Whether the values are lists."""
        return any(isinstance(value, list) for value in self.values)

    @property
    def counts(self) -> Counter[str]:
        """How often each value occurs; of lists, each item."""
        return Counter(itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in self.given))

    def lengths(self) -> list[int]:
        """The lengths of the values in characters."""
        return [len(value) for value in self.given if isinstance(value, str)]

    def textness(self) -> float:
        """How much the column looks like running text: long, varied, made of words. 0 for numbers, ids and URLs."""
        values = [value for value in self.given if isinstance(value, str)]
        if not values:
            return 0.0
        worded = sum(not _NO_TEXT.fullmatch(v) and (" " in v.strip() or not v.isascii()) for v in values) / len(values)
        return statistics.fmean(map(len, values)) * (len(set(values)) / len(values)) * worded


@dataclass(frozen=True)
class Sample:
    """The first rows of a file."""

    columns: list[Column]
    rows: int
    whole: bool
    """Whether these are all the file's rows."""
    skip_rows: int = 0
    """Lines after the header that are no data."""
    broken: int = 0
    """Rows that could not be read."""


def look(path: UPath) -> Sample:
    """Reads up to 50,000 rows of a csv, tsv, jsonl or Parquet file.

    Raises:
        InputError: it is none of these, empty, or its beginning cannot be read.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; shoal init looks at one file.")
    kind = path.suffix.lower()
    if kind in _DELIMITERS:
        sample = _look_separated(path, _DELIMITERS[kind])
    elif kind in (".jsonl", ".ndjson", ".json"):
        sample = _look_jsonl(path)
    elif kind in (".parquet", ".pq"):
        sample = _look_parquet(path)
    else:
        raise InputError(f"{path}: shoal init looks at .csv, .tsv, .tab, .jsonl and .parquet files.")
    if sample.rows == 0:
        raise InputError(f"{path} holds no rows.")
    return sample


def _head(path: UPath) -> tuple[str, bool]:
    with path.fs.open(path.path, "rb") as stream:
        data = stream.read(_SAMPLE_BYTES + 1)
    whole = len(data) <= _SAMPLE_BYTES
    if not whole:
        data = data[: data.rfind(b"\n") + 1]
    return data.decode("utf-8-sig", "replace"), whole


def _look_separated(path: UPath, delimiter: str) -> Sample:
    text, whole = _head(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    broken = 0

    def rows() -> Iterator[list[str]]:
        nonlocal broken
        while True:
            try:
                yield next(reader)
            except StopIteration:
                return
            except csv.Error:
                broken += 1

    every = rows()
    header = [name.strip() for name in next(every, [])]
    if not any(header):
        raise InputError(f"{path} has no readable header: its first line must name the columns.")
    if len(header) == 1 and (
        other := next((sign for sign in ";|\t," if sign != delimiter and sign in header[0]), None)
    ):
        name = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}[other]
        raise InputError(
            f"{path} seems to separate its columns by {name}; write it with "
            f"{'tabs' if delimiter == chr(9) else 'commas'}, or with the other ending."
        )
    skip = 0
    first = list(itertools.islice(every, 2))
    if first and all(cell.strip().lower() in _ORANGE_TYPES for cell in first[0]):
        skip, first = 2, []
    kept: list[list[str]] = []
    for row in itertools.chain(first, every):
        if len(kept) == SAMPLE_ROWS:
            whole = False
            break
        if len(row) == len(header):
            kept.append(row)
        elif row:
            broken += 1
    return Sample([Column(n, [row[i] for row in kept]) for i, n in enumerate(header)], len(kept), whole, skip, broken)


def _look_jsonl(path: UPath) -> Sample:
    text, whole = _head(path)
    rows: list[dict[str, Any]] = []
    broken = 0
    for line in filter(str.strip, text.split("\n")):
        if len(rows) == SAMPLE_ROWS:
            whole = False
            break
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            rows.append(value)
        else:
            broken += 1
    if not rows:
        raise InputError(f"{path} is not jsonl: no line of its beginning is a JSON object.")
    names = dict.fromkeys(name for row in rows for name in row)
    return Sample([Column(n, [_plain(row.get(n)) for row in rows]) for n in names], len(rows), whole, 0, broken)


def _look_parquet(path: UPath) -> Sample:
    try:
        with path.fs.open(path.path, "rb") as stream:
            file = pq.ParquetFile(stream, pre_buffer=False)
            total = file.metadata.num_rows
            rows: list[dict[str, Any]] = []
            for batch in file.iter_batches(batch_size=5_000):
                rows += batch.to_pylist()[: SAMPLE_ROWS - len(rows)]
                if len(rows) == SAMPLE_ROWS:
                    break
            names = file.schema_arrow.names
    except (ValueError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(f"{path} is not a Parquet file: {reason}.") from error
    return Sample([Column(n, [_plain(row.get(n)) for row in rows]) for n in names], len(rows), len(rows) == total)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return [str(item) for item in value]
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)
