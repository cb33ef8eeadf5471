"""The second pass of `prepare`: each partition loses its duplicates, is split, and takes its final order."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from models.labels import LabelColumn
from pipelines.prepared import SPLITS
from pipelines.preparing.data import DataSettings
from pipelines.preparing.exchange import read_piece, read_rows, write_rows
from pipelines.preparing.sieve import Sieve, whole
from pipelines.preparing.splitting import SplittingSettings, assign_splits, find_duplicates, label_codes, mix
from pipelines.preparing.units import Unit, first_lines

_SAMPLE_BYTES = 2**25


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
    salt: int = 0
    """Where it is not 0, the splits are others than without it: what one split leaves can be split again."""

    def __call__(self, partition: int, pieces: list[Piece]) -> dict[str, Any]:
        table = self._read(pieces)
        if table is None:
            return {"rows": {}, "labels": {}, "dropped": {}, "conflicts": 0, "text_bytes": 0, "rejected": 0}
        result: dict[str, Any] = {"dropped": {}, "conflicts": 0, "rejected": 0}
        folder = UPath(self.work) / "gather"
        if self.splitting.deduplicate == "exact":
            table = self._deduplicate(table, result, folder / f"{partition:06d}.rejected")
        halves = table["high"].to_numpy()
        if self.salt:
            halves = mix(halves, self.salt)
        split = assign_splits(halves, table["given"].to_numpy(), self.given, self.splitting)
        order = np.lexsort((table["row"].to_numpy(), table["key"].to_numpy()))
        names = [name for name in table.column_names if name not in ("key", "high", "low", "given", "file", "line")]
        result |= {"rows": {}, "labels": {}, "text_bytes": int(whole(table["text"]).nbytes)}
        for code, name in enumerate(SPLITS):
            chosen = table.select(names).take(pa.array(order[split[order] == code]))
            if len(chosen):
                write_rows(folder / f"{partition:06d}-{name}.rows", chosen)
                result["rows"][name] = len(chosen)
                for label in self.data.labels:
                    classes = count_classes(whole(chosen[f"label:{label.column}"]))
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
        labels = [whole(table[f"label:{label.column}"]) for label in self.data.labels]
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
        twins = table.select(["file", "line"]).take(pa.array(found.kept[lost])).to_pylist()
        reasons = [
            f"equal to row {twin['line'] + 1} of {twin['file']}" + (", which has other labels" if conflict else "")
            for twin, conflict in zip(twins, found.conflicting[lost].tolist(), strict=True)
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


def count_classes(column: pa.Array) -> dict[str, int]:
    """How many rows have each class; missing labels do not count."""
    flat = column.flatten() if pa.types.is_list(column.type) else column
    return {item["values"]: item["counts"] for item in pc.value_counts(flat.drop_null()).to_pylist()}


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
