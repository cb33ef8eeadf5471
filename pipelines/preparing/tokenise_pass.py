"""The third pass of `prepare`: each output file's rows are tokenised and written in chunks."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from upath import UPath

from models.labels import LabelColumn
from pipelines.preparing.exchange import read_rows, write_chunks
from pipelines.preparing.sieve import whole
from pipelines.preparing.tokenising import Encoder

_SMALLEST_FILE, _LARGEST_FILE, _FILES_WANTED = 2**20, 2**24, 16


@dataclass(frozen=True)
class OutputFile:
    """One Parquet file to write: rows `start` to `stop` of a split, which stand in these parts of partitions."""

    split: str
    name: str
    slices: tuple[tuple[int, int, int], ...]
    """Partition, first row, end row."""

    def read(self, work: UPath) -> pa.Table:
        """The rows, as the pass before has left them."""
        parts = [
            read_rows(work / "gather" / f"{part:06d}-{self.split}.rows", start, stop)
            for part, start, stop in self.slices
        ]
        return pa.concat_tables(parts).combine_chunks()


@dataclass(frozen=True)
class TokenisePass:
    """An output file's rows are tokenised and written as whole chunks."""

    labels: tuple[LabelColumn, ...]
    max_length: int
    chunk_rows: int
    work: str
    out: str

    def __call__(self, number: int, file: OutputFile) -> dict[str, Any]:
        table = file.read(UPath(self.work))
        texts = table["text"].to_pylist()
        pair = "text_pair" in table.column_names
        encoder = encoder_of(self.out, self.max_length)
        tokens = encoder.encode_pairs(texts, table["text_pair"].to_pylist()) if pair else encoder.encode(texts)
        columns: dict[str, Any] = {"row": table["row"], "text": table["text"]}
        if pair:
            columns["text_pair"] = table["text_pair"]
        columns |= tokens.columns()
        for label in self.labels:
            columns[f"label:{label.name}"] = class_indices(whole(table[f"label:{label.name}"]), label)
        columns |= {name: table[name] for name in table.column_names if name.startswith("column:")}
        finished = pa.table(columns)
        write_chunks(UPath(self.out) / file.name, finished, self.chunk_rows)
        return {
            "rows": len(finished),
            "chunks": -(-len(finished) // self.chunk_rows),
            "tokens": int(tokens.lengths.sum()),
            "truncated": int(tokens.truncated.sum()),
            "lengths": count_lengths(tokens.lengths),
        }


@lru_cache(maxsize=1)
def encoder_of(out: str, max_length: int) -> Encoder:
    """Kept by a worker process from task to task: large vocabularies take a second to load."""
    return Encoder((UPath(out) / "tokenizer" / "tokenizer.json").read_bytes(), max_length)


def count_lengths(lengths: NDArray[np.integer[Any]]) -> dict[str, int]:
    """How many texts have each length; the keys are those of JSON."""
    found, counts = np.unique(lengths, return_counts=True)
    return dict(zip(map(str, found.tolist()), counts.tolist(), strict=True))


def file_plan(counts: dict[str, list[int]], chunk_rows: int, text_bytes: int) -> list[OutputFile]:
    """The output files: of each split's rows, in order, as many whole chunks as make 1 to 16 MiB of text.

    There are 16 files or more, where each can have 1 MiB.

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


def class_indices(column: pa.Array, label: LabelColumn) -> pa.Array:
    """Labels as indices into the column's classes: -1 where missing, or lists (null where missing)."""
    classes = pa.array(label.classes, pa.string())
    if not label.multi:
        return pc.fill_null(pc.index_in(column, classes), -1).cast(pa.int32())
    indices = [None if cell is None else [label.classes.index(name) for name in cell] for cell in column.to_pylist()]
    return pa.array(indices, pa.list_(pa.int32()))
