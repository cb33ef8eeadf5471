"""The three passes of `prepare`, each a callable that Ray Data runs once for each of its parts."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from models.labels import LabelColumn
from pipelines.cleaning import CleaningSettings, clean
from pipelines.decoding import decode
from pipelines.exchange import read_piece, read_rows, write_bytes, write_rows, write_spill
from pipelines.prepared import SPLITS
from pipelines.sieve import REJECTED, Sieve
from pipelines.sources import DataSettings
from pipelines.splitting import (
    SplittingSettings,
    assign_splits,
    digests,
    find_duplicates,
    label_codes,
    mix,
    partition_of,
)
from pipelines.tokenising import Encoder
from pipelines.units import Unit

_SMALLEST_FILE, _LARGEST_FILE, _FILES_WANTED = 2**20, 2**24, 16
_SAMPLE_BYTES = 2**25


@dataclass(frozen=True)
class CleanPass:
    """A unit becomes `clean/NUMBER.spill`, its usable rows by partition, and `clean/NUMBER.rejected`."""

    data: DataSettings
    cleaning: CleaningSettings
    splitting: SplittingSettings
    partitions: int
    work: str

    def __call__(self, number: int, unit: Unit) -> dict[str, Any]:
        decoded = decode(unit, self.data)
        sieve = decoded.sieve
        clean(sieve, self.data, self.cleaning, unit.source.split)
        table = sieve.table.combine_chunks()
        text = _array(table["text"])
        pair = _array(table["text_pair"]) if self.data.text_pair else None
        high, low = digests(text, pair)
        unique = np.zeros(len(high), np.uint64)
        if self.splitting.deduplicate == "none":
            places = (np.uint64(number) << np.uint64(32)) + table["position"].to_numpy().astype(np.uint64)
            unique = mix(places, 1)
        keys = mix(low ^ unique, self.splitting.seed)
        table = (
            table.append_column("key", pa.array(keys))
            .append_column("high", pa.array(high))
            .append_column("low", pa.array(low))
        )
        folder = UPath(self.work) / "clean"
        offsets = write_spill(
            table, partition_of(keys, self.partitions), self.partitions, folder / f"{number:06d}.spill"
        )
        if len(sieve.rejected):
            write_rows(folder / f"{number:06d}.rejected", sieve.rejected)
        return {
            "rows": decoded.rows,
            "lines": decoded.lines,
            "offsets": offsets,
            "given": sorted({int(code) for code in np.unique(table["given"].to_numpy()) if code >= 0}),
            "dropped": dict(sieve.dropped),
            "changed": dict(sieve.changed),
            "rejected": len(sieve.rejected),
        }


@dataclass(frozen=True)
class Piece:
    """A partition's rows of one unit: where they are in its spill file, and where the unit is in the data."""

    unit: int
    start: int
    stop: int
    first_row: int
    first_line: int
    file: str


def pieces_of(units: list[Unit], cleaned: list[dict[str, Any]], partitions: int) -> list[list[Piece]]:
    """For each partition, its pieces of all units, in order."""
    rows = list(itertools.accumulate((result["rows"] for result in cleaned), initial=0))
    lines = first_lines(units, cleaned)
    files = [unit.source.path for unit in units]
    return [
        [
            Piece(
                number, result["offsets"][part], result["offsets"][part + 1], rows[number], lines[number], files[number]
            )
            for number, result in enumerate(cleaned)
            if result["offsets"][part] < result["offsets"][part + 1]
        ]
        for part in range(partitions)
    ]


@dataclass(frozen=True)
class GatherPass:
    """A partition becomes `gather/NUMBER-SPLIT.rows`, in final order, and `gather/NUMBER.rejected`."""

    data: DataSettings
    splitting: SplittingSettings
    given: frozenset[int]
    """The splits that some rows come with."""
    work: str

    def __call__(self, partition: int, pieces: list[Piece]) -> dict[str, Any]:
        table = self._read(pieces)
        if table is None:
            return {"rows": {}, "labels": {}, "dropped": {}, "conflicts": 0, "text_bytes": 0, "rejected": 0}
        result: dict[str, Any] = {"dropped": {}, "conflicts": 0, "rejected": 0}
        folder = UPath(self.work) / "gather"
        if self.splitting.deduplicate == "exact":
            table = self._deduplicate(table, result, folder / f"{partition:06d}.rejected")
        split = assign_splits(table["high"].to_numpy(), table["given"].to_numpy(), self.given, self.splitting)
        order = np.lexsort((table["row"].to_numpy(), table["key"].to_numpy()))
        names = [name for name in table.column_names if name not in ("key", "high", "low", "given", "file", "line")]
        result |= {"rows": {}, "labels": {}, "text_bytes": int(_array(table["text"]).nbytes)}
        for code, name in enumerate(SPLITS):
            chosen = table.select(names).take(pa.array(order[split[order] == code]))
            if len(chosen):
                write_rows(folder / f"{partition:06d}-{name}.rows", chosen)
                result["rows"][name] = len(chosen)
                for label in self.data.labels:
                    classes = count_classes(_array(chosen[f"label:{label.column}"]))
                    result["labels"].setdefault(label.column, {})[name] = classes
        return result

    def _read(self, pieces: list[Piece]) -> pa.Table | None:
        tables = []
        for piece in pieces:
            table = read_piece(UPath(self.work) / "clean" / f"{piece.unit:06d}.spill", piece.start, piece.stop)
            rows, lines = pc.add(table["position"], piece.first_row), pc.add(table["line"], piece.first_line)
            tables.append(
                table.drop_columns(["position", "line"])
                .append_column("row", rows)
                .append_column("line", lines)
                .append_column("file", pa.array([piece.file] * len(table), pa.string()))
            )
        return pa.concat_tables(tables).combine_chunks() if tables else None

    def _deduplicate(self, table: pa.Table, result: dict[str, Any], path: UPath) -> pa.Table:
        labels = [_array(table[f"label:{label.column}"]) for label in self.data.labels]
        codes = label_codes(labels) if labels else np.zeros(len(table), np.int64)
        found = find_duplicates(
            table["high"].to_numpy(),
            table["low"].to_numpy(),
            table["given"].to_numpy(),
            table["row"].to_numpy(),
            codes,
        )
        lost = ~found.keep
        if not lost.any():
            return table
        reasons = [
            f"equal to row {row}" + (", which has other labels" if conflict else "")
            for row, conflict in zip(found.kept_row[lost].tolist(), found.conflicting[lost].tolist(), strict=True)
        ]
        dropped = table.filter(pa.array(lost))
        sieve = Sieve(table, "")
        sieve.reject("duplicates", dropped["line"], reasons, dropped["text"])
        rejected = sieve.rejected.set_column(0, "file", dropped["file"])
        write_rows(path, rejected)
        result["rejected"] = len(rejected)
        result["dropped"] = {"duplicates": len(rejected)}
        result["conflicts"] = int(found.conflicting[lost].sum())
        return table.filter(pa.array(found.keep))

    def label_columns(self, counts: dict[str, dict[str, Counter[str]]]) -> tuple[LabelColumn, ...]:
        """The label columns with their classes: the recipe's, else all that occur in usable rows; sorted."""
        columns = []
        for label in self.data.labels:
            occurring = {name for split in counts.get(label.column, {}).values() for name in split}
            classes = tuple(sorted(label.classes or occurring))
            columns.append(LabelColumn(name=label.column, classes=classes, multi=label.multi))
        return tuple(columns)


@dataclass(frozen=True)
class OutputFile:
    """One Parquet file to write: rows `start` to `stop` of a split, which stand in these parts of partitions."""

    split: str
    name: str
    slices: tuple[tuple[int, int, int], ...]
    """Partition, first row, end row."""


@dataclass(frozen=True)
class TokenisePass:
    """An output file's rows are tokenised and written as whole chunks."""

    labels: tuple[LabelColumn, ...]
    max_length: int
    chunk_rows: int
    work: str
    out: str

    def __call__(self, number: int, file: OutputFile) -> dict[str, Any]:
        folder = UPath(self.work) / "gather"
        table = pa.concat_tables(
            [read_rows(folder / f"{part:06d}-{file.split}.rows", start, stop) for part, start, stop in file.slices]
        ).combine_chunks()
        texts = table["text"].to_pylist()
        pair = "text_pair" in table.column_names
        encoder = _encoder(self.out, self.max_length)
        tokens = encoder.encode_pairs(texts, table["text_pair"].to_pylist()) if pair else encoder.encode(texts)
        columns: dict[str, Any] = {"row": table["row"], "text": table["text"]}
        if pair:
            columns["text_pair"] = table["text_pair"]
        columns |= tokens.columns()
        for label in self.labels:
            columns[f"label:{label.name}"] = class_indices(_array(table[f"label:{label.name}"]), label)
        columns |= {name: table[name] for name in table.column_names if name.startswith("column:")}
        buffer = pa.BufferOutputStream()
        finished = pa.table(columns)
        with pq.ParquetWriter(buffer, finished.schema, compression="zstd", use_dictionary=False) as writer:
            for start in range(0, len(finished), self.chunk_rows):
                writer.write_table(finished.slice(start, self.chunk_rows), row_group_size=self.chunk_rows)
        write_bytes(UPath(self.out) / file.name, buffer.getvalue())
        lengths, counts = np.unique(tokens.lengths, return_counts=True)
        return {
            "rows": len(finished),
            "chunks": -(-len(finished) // self.chunk_rows),
            "tokens": int(tokens.lengths.sum()),
            "truncated": int(tokens.truncated.sum()),
            "lengths": dict(zip(map(str, lengths.tolist()), counts.tolist(), strict=True)),
        }


@lru_cache(maxsize=1)
def _encoder(out: str, max_length: int) -> Encoder:
    """Kept by a worker process from task to task: large vocabularies take a second to load."""
    return Encoder((UPath(out) / "tokenizer" / "tokenizer.json").read_bytes(), max_length)


def file_plan(counts: dict[str, list[int]], chunk_rows: int, text_bytes: int) -> list[OutputFile]:
    """The output files: about 16 of them or more, each of whole chunks that follow one another in a split and hold 1 to 16 MiB.

    `counts` has the rows of each split in each partition.
    """
    total = sum(map(sum, counts.values()))
    chunk_bytes = max(text_bytes / max(total, 1) * chunk_rows, 1)
    file_bytes = min(max(text_bytes // _FILES_WANTED, _SMALLEST_FILE), _LARGEST_FILE)
    file_rows = max(round(file_bytes / chunk_bytes), 1) * chunk_rows
    files = []
    for split, rows in counts.items():
        ends = np.cumsum(rows).tolist()
        for number, start in enumerate(range(0, ends[-1], file_rows)):
            stop = min(start + file_rows, ends[-1])
            slices = []
            for part, (size, end) in enumerate(zip(rows, ends, strict=True)):
                low, high = max(start, end - size), min(stop, end)
                if low < high:
                    slices.append((part, low - (end - size), high - (end - size)))
            files.append(OutputFile(split, f"{split}/part-{number:05d}.parquet", tuple(slices)))
    return files


def count_classes(column: pa.Array) -> dict[str, int]:
    """How many rows have each class; missing labels do not count."""
    flat = column.flatten() if pa.types.is_list(column.type) else column
    return {item["values"]: item["counts"] for item in pc.value_counts(flat.drop_null()).to_pylist()}


def class_indices(column: pa.Array, label: LabelColumn) -> pa.Array:
    """Labels as indices into the column's classes: -1 where missing, or lists (null where missing)."""
    classes = pa.array(label.classes, pa.string())
    if not label.multi:
        return pc.fill_null(pc.index_in(column, classes), -1).cast(pa.int32())
    indices = [None if cell is None else [label.classes.index(name) for name in cell] for cell in column.to_pylist()]
    return pa.array(indices, pa.list_(pa.int32()))


def sample_texts(work: UPath, counts: list[int], pair: bool) -> Iterator[str]:
    """Training texts, in their shuffled order, up to 32 MiB: what a tokenizer is trained on."""
    taken = 0
    for partition, rows in enumerate(counts):
        if rows:
            table = read_rows(work / "gather" / f"{partition:06d}-train.rows", 0, rows)
            for column in ("text", "text_pair") if pair else ("text",):
                for text in table[column].to_pylist():
                    if taken > _SAMPLE_BYTES:
                        return
                    taken += len(text)
                    yield text


def first_lines(units: list[Unit], cleaned: list[dict[str, Any]]) -> list[int]:
    """The line of its file at which each unit begins, from 0; units of tables count lines in the file already."""
    lines: list[int] = []
    seen: dict[tuple[str, str | None], int] = {}
    for unit, result in zip(units, cleaned, strict=True):
        key = (unit.source.path, unit.source.split)
        lines.append(seen.get(key, unit.source.header_lines))
        seen[key] = lines[-1] + result["lines"]
    return lines


def write_rejected(
    work: UPath, folder: UPath, units: list[Unit], cleaned: list[dict[str, Any]], gathered: list[dict[str, Any]]
) -> int:
    """Joins what the passes rejected into one Parquet file, piece by piece; returns how many rows that is."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = first_lines(units, cleaned)
    path = folder / "part-00000.parquet"
    count = 0
    with path.fs.open(path.path, "wb") as stream, pq.ParquetWriter(stream, REJECTED, compression="zstd") as writer:
        for number, result in enumerate(cleaned):
            if result["rejected"]:
                table = read_rows(work / "clean" / f"{number:06d}.rejected", 0, result["rejected"])
                table = table.set_column(1, "row", pc.add(table["row"], lines[number]))
                writer.write_table(table)
                count += len(table)
        for partition, result in enumerate(gathered):
            if result["rejected"]:
                table = read_rows(work / "gather" / f"{partition:06d}.rejected", 0, result["rejected"])
                writer.write_table(table)
                count += len(table)
    return count


def _array(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
