"""The last passes of `pack`: documents become tokens, weights become copies, and tokens become full rows.

What is packed is one long stream: the documents in their shuffled order, part by part, and after those of a part once
more those of them that stand there twice, and so on. As each document's length is known, so is each file's part of the
stream, to the token: a task takes its part, whoever has the others, and packs it into whole rows (`models.packing`).
Only a document that lies across the border of two files is split for it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from upath import UPath

from models.feed import mix, mix_range
from models.packing import pack
from pipelines.preparing.exchange import read_rows, write_chunks, write_rows
from pipelines.preparing.sieve import whole
from pipelines.preparing.splitting import mix as mix_keys
from pipelines.preparing.tokenise_pass import OutputFile, count_lengths, encoder_of

_WHOLE = 2**31 - 1
_SMALLEST_FILE, _LARGEST_FILE, _FILES_WANTED = 2**18, 2**22, 16


@dataclass(frozen=True)
class TokenPass:
    """A part of a split's documents becomes `tokens/NUMBER.rows`: each one's row, source and ids, uncut."""

    firsts: tuple[int, ...]
    """The first row of each source."""
    end: int | None
    """What ends a document, where the tokenizer by itself puts nothing around it."""
    unknown: int
    """What stands for what the tokenizer does not know; -1 where it knows everything."""
    work: str
    out: str

    def __call__(self, number: int, part: OutputFile) -> dict[str, Any]:
        table = part.read(UPath(self.work))
        texts = whole(table["text"])
        tokens = encoder_of(self.out, _WHOLE).encode(texts.to_pylist())
        ids, lengths = tokens.ids, tokens.lengths.astype(np.int64)
        if self.end is not None:
            ids = np.insert(ids, np.cumsum(lengths), self.end)
            lengths = lengths + 1
        rows = table["row"].to_numpy()
        source = np.searchsorted(self.firsts, rows, side="right") - 1
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        columns = {
            "row": table["row"],
            "source": pa.array(source.astype(np.int16)),
            "ids": pa.ListArray.from_arrays(offsets, pa.array(ids.astype(np.int32))),
        }
        write_rows(UPath(self.work) / "tokens" / f"{number:06d}.rows", pa.table(columns))
        return {
            "documents": len(rows),
            "tokens": np.bincount(source, lengths, len(self.firsts)).astype(int).tolist(),
            "bytes": pc.sum(pc.binary_length(texts)).as_py() or 0,
            "unknown": int((ids == self.unknown).sum()),
            "lengths": count_lengths(lengths),
        }


@dataclass(frozen=True)
class Copies:
    """How many times each document stands in the stream: its source's number, rounded up or down by its row."""

    times: tuple[float, ...]
    """By source."""
    seed: int

    @property
    def rounds(self) -> int:
        """The most times that a document stands there."""
        return max(1, math.ceil(max(self.times, default=1.0)))

    def of(self, rows: NDArray[np.int64], sources: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Copies of each document, [documents]."""
        times = np.array(self.times)[sources]
        whole_times = np.floor(times)
        share = mix_keys(rows.astype(np.uint64), self.seed).astype(np.float64) / 2.0**64
        copies: NDArray[np.int64] = (whole_times + (share < times - whole_times)).astype(np.int64)
        return copies


@dataclass(frozen=True)
class WeighPass:
    """Counts the tokens of a part's documents in each round."""

    copies: Copies
    work: str

    def __call__(self, _: int, part: tuple[int, int]) -> dict[str, Any]:
        """`part` is a part's number among those of all splits, and how many documents it has."""
        rows, sources, _ids, lengths = _documents(self.work, *part)
        copies = self.copies.of(rows, sources)
        tokens = [int(lengths[copies > turn].sum()) for turn in range(self.copies.rounds)]
        return {"tokens": tokens, "documents": [int((copies > turn).sum()) for turn in range(self.copies.rounds)]}


@dataclass(frozen=True)
class StreamPart:
    """Tokens `start` to `stop` of the stream of one round's documents in one part."""

    part: int
    documents: int
    """Of the part, in all rounds."""
    turn: int
    start: int
    stop: int


@dataclass(frozen=True)
class PackedFile:
    """One Parquet file of packed rows, the first of which is `first_row` of the dataset."""

    name: str
    first_row: int
    stream: tuple[StreamPart, ...]
    copies: Copies | None
    """Of the split's documents; None where each stands there once."""


@dataclass(frozen=True)
class PackPass:
    """A file's part of the stream becomes full rows, in an order of their own, written as whole chunks."""

    length: int
    chunk_rows: int
    seed: int
    work: str
    out: str

    def __call__(self, number: int, file: PackedFile) -> dict[str, Any]:
        documents: list[int] = []
        pieces: list[NDArray[np.int32]] = []
        opened: tuple[int, Any] = (-1, None)
        for part in file.stream:
            if part.part != opened[0]:
                opened = part.part, _documents(self.work, part.part, part.documents)
            rows, sources, ids, lengths = opened[1]
            there = file.copies.of(rows, sources) > part.turn if file.copies else np.ones(len(rows), bool)
            ends = np.cumsum(lengths)
            places = np.cumsum(lengths * there)
            first, last = np.searchsorted(places, (part.start, part.stop - 1), side="right")
            for at in range(first, last + 1):
                if there[at]:
                    begin = places[at] - lengths[at]
                    low, high = max(part.start - begin, 0), min(part.stop - begin, lengths[at])
                    begin = ends[at] - lengths[at]
                    pieces.append(ids[begin + low : begin + high].copy())
                    documents.append(int(rows[at]))
        packed = list(pack([len(piece) for piece in pieces], self.length))
        order = np.argsort(mix_range(mix(self.seed, file.first_row), len(packed)), kind="stable")
        # A row that is not full stands last.
        order = np.concatenate([order[order != len(packed) - 1], [len(packed) - 1]])
        table = self._table(file.first_row, [packed[place] for place in order], pieces, documents)
        write_chunks(UPath(self.out) / file.name, table, self.chunk_rows)
        long = sum(len(piece) > self.length for piece in pieces)
        in_one = sum(len(piece) == len(pieces[piece.document]) for row in packed for piece in row)
        return {
            "rows": len(table),
            "chunks": -(-len(table) // self.chunk_rows),
            "tokens": sum(map(len, pieces)),
            "documents": len(pieces),
            "long": long,
            "split": len(pieces) - long - in_one,
        }

    def _table(
        self, first_row: int, packed: list[Any], pieces: list[NDArray[np.int32]], documents: list[int]
    ) -> pa.Table:
        ids = np.concatenate([pieces[p.document][p.start : p.stop] for row in packed for p in row])
        starts = [0]
        for row in packed:
            starts += itertools.accumulate((len(piece) for piece in row[:-1]), initial=0)
        counts = np.array([len(row) for row in packed])
        lengths = np.array([sum(map(len, row)) for row in packed])
        pieces_end = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        ids_end = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        named = [documents[piece.document] for row in packed for piece in row]
        return pa.table(
            {
                "row": pa.array(np.arange(first_row, first_row + len(packed))),
                "input_ids": pa.ListArray.from_arrays(ids_end, pa.array(ids.astype(np.int32))),
                "length": pa.array(lengths.astype(np.int32)),
                "starts": pa.ListArray.from_arrays(pieces_end, pa.array(starts[1:], pa.int32())),
                "documents": pa.ListArray.from_arrays(pieces_end, pa.array(named, pa.int64())),
            }
        )


def _documents(
    work: str, number: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int16], NDArray[np.int32], NDArray[np.int64]]:
    """A part's rows and sources, [documents], their ids end to end, and their lengths."""
    table = read_rows(UPath(work) / "tokens" / f"{number:06d}.rows", 0, count).combine_chunks()
    ids = whole(table["ids"])
    lengths = np.asarray(pc.list_value_length(ids).to_numpy(zero_copy_only=False), np.int64)
    return table["row"].to_numpy(), table["source"].to_numpy(), ids.flatten().to_numpy(), lengths


def packed_files(
    split: str,
    parts: Sequence[tuple[int, int, Sequence[int]]],
    length: int,
    chunk_rows: int,
    first_row: int,
    copies: Copies | None = None,
) -> list[PackedFile]:
    """The files of a split, each of whole chunks of full rows, but for the last.

    `parts` are (number, documents, tokens by round).
    """
    stream: list[StreamPart] = []
    for number, documents, by_turn in parts:
        # A part's rounds stand together, so that it is read once and the mixture is the same everywhere.
        stream += [StreamPart(number, documents, turn, 0, tokens) for turn, tokens in enumerate(by_turn) if tokens]
    total = sum(part.stop for part in stream)
    wanted = min(max(total // _FILES_WANTED, _SMALLEST_FILE), _LARGEST_FILE)
    file_tokens = max(round(wanted / (length * chunk_rows)), 1) * length * chunk_rows
    ends = np.cumsum([part.stop for part in stream]).tolist()
    files = []
    for number, start in enumerate(range(0, total, file_tokens)):
        stop = min(start + file_tokens, total)
        taken = [
            StreamPart(
                part.part,
                part.documents,
                part.turn,
                max(start - (end - part.stop), 0),
                min(stop - (end - part.stop), part.stop),
            )
            for part, end in zip(stream, ends, strict=True)
            if end > start and end - part.stop < stop
        ]
        files.append(
            PackedFile(f"{split}/part-{number:05d}.parquet", first_row + start // length, tuple(taken), copies)
        )
    return files


def shares_to_times(tokens: Sequence[int], weights: Sequence[float]) -> tuple[float, ...]:
    """How many times each source's documents stand in an epoch as long as all sources together."""
    total, weighed = sum(tokens), sum(weights)
    return tuple(weight / weighed * total / max(own, 1) for own, weight in zip(tokens, weights, strict=True))
