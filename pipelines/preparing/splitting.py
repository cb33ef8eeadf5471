"""Duplicates, splits and the global order, all from one digest of a row's normalised content.

A row's *key* is a 64-bit number mixed from its content's digest and the seed. Sorting by key is the global
shuffle. Equal contents have equal keys, so cutting the range of keys into partitions brings duplicates together
and shuffles at the same time: the data moves once. A partition is read, sorted and written by one task, and the
order of all rows does not depend on how many partitions there are.
"""

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from models.settings import Settings
from pipelines.prepared import SPLITS
from pipelines.preparing.sieve import whole

UInt64s = NDArray[np.uint64]
TRAIN, VALIDATION, TEST = range(len(SPLITS))


class SplittingSettings(Settings):
    """How the rows are told apart, dealt to splits and ordered."""

    deduplicate: Literal["exact", "none"] = Field(
        "exact",
        description="Of equal texts, one is kept: in the test split before validation before train, where splits are "
        "given, and with the labels that most of the equal texts have.",
    )
    validation_share: float = Field(
        0.1, ge=0, lt=1, description="Share of the rows for validation, where the data does not give that split."
    )
    test_share: float = Field(
        0.1, ge=0, lt=1, description="Share of the rows for the test, where the data does not give that split."
    )
    seed: int = Field(0, description="Seed of the shuffle.")


def digests(texts: pa.Array, pairs: pa.Array | None) -> tuple[UInt64s, UInt64s]:
    """128 bits of BLAKE2b of each row's content (the pair's parts with a NUL between), as two 64-bit halves."""
    contents = _byte_views(texts)
    blake = hashlib.blake2b
    if pairs is None:
        joined = b"".join([blake(content, digest_size=16).digest() for content in contents])
    else:
        pieces = []
        for content, pair in zip(contents, _byte_views(pairs), strict=True):
            state = blake(content, digest_size=16)
            state.update(b"\0")
            state.update(pair)
            pieces.append(state.digest())
        joined = b"".join(pieces)
    halves = np.frombuffer(joined, "<u8").reshape(-1, 2)
    return halves[:, 0].copy(), halves[:, 1].copy()


def _byte_views(texts: pa.Array) -> list[memoryview]:
    texts = pa.concat_arrays([texts])  # without an offset of its own
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[: len(texts) + 1].tolist()
    view = memoryview(data) if data is not None else memoryview(b"")
    return [view[start:stop] for start, stop in itertools.pairwise(ends)]


def mix(values: UInt64s, seed: int) -> UInt64s:
    """A bijection of 64-bit numbers that looks random (splitmix64), another for each seed."""
    with np.errstate(over="ignore"):
        x = values + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def partition_of(keys: UInt64s, partitions: int) -> NDArray[np.int64]:
    """Which of `partitions` equal ranges each key falls into."""
    return ((keys >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)).astype(np.int64)


def assign_splits(
    halves: UInt64s, given: NDArray[np.int8], given_splits: frozenset[int], settings: SplittingSettings
) -> NDArray[np.int8]:
    """Each row's split: the given one, else by content; what no row was given is cut from train."""
    share = halves.astype(np.float64) / 2.0**64
    test = 0.0 if TEST in given_splits else settings.test_share
    validation = 0.0 if VALIDATION in given_splits else settings.validation_share
    drawn = np.where(share < test, TEST, np.where(share < test + validation, VALIDATION, TRAIN))
    return np.where((given == VALIDATION) | (given == TEST), given, drawn).astype(np.int8)


@dataclass(frozen=True)
class Duplicates:
    """Which rows of a partition stay, and for those that do not, which row stands for them."""

    keep: NDArray[np.bool_]
    kept: NDArray[np.int64]
    """For every row, the place (in these arrays) of the row that is kept of its group."""
    conflicting: NDArray[np.bool_]
    """Rows whose labels differ from those of the row that is kept."""


def find_duplicates(
    high: UInt64s, low: UInt64s, given: NDArray[np.int8], rows: NDArray[np.int64], labels: NDArray[np.int64]
) -> Duplicates:
    """Of rows with equal digests one is kept: in the last given split (a leak into the test would flatter it),
    there with the labels that most have, among those the first row. `labels` numbers each combination of labels.
    """
    order = np.lexsort((rows, -given, low, high))
    count = len(order)
    starts = np.ones(count, bool)
    starts[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    first = np.flatnonzero(starts)
    stops = np.append(first[1:], count)
    winner = first.copy()
    sorted_labels, sorted_given = labels[order], given[order]
    if count:
        differ = np.minimum.reduceat(sorted_labels, first) != np.maximum.reduceat(sorted_labels, first)
        for group in np.flatnonzero(differ).tolist():
            start, stop = int(first[group]), int(stops[group])
            stop = start + int(np.searchsorted(-sorted_given[start:stop], -sorted_given[start], side="right"))
            _, places, votes = np.unique(sorted_labels[start:stop], return_index=True, return_counts=True)
            best = places[votes == votes.max()].min()
            winner[group] = start + int(best)
    group_of = np.cumsum(starts) - 1
    keep = np.zeros(count, bool)
    keep[order[winner]] = True
    kept, conflicting = np.empty(count, np.int64), np.empty(count, bool)
    kept[order] = order[winner][group_of] if count else 0
    conflicting[order] = sorted_labels != sorted_labels[winner][group_of] if count else False
    return Duplicates(keep, kept, conflicting)


def label_codes(columns: list[Any]) -> NDArray[np.int64]:
    """A number for each row's combination of labels, equal where all labels are."""
    codes: NDArray[np.int64] | None = None
    for column in columns:
        flat = pc.binary_join(column, "\x1f") if pa.types.is_list(column.type) else column
        flat = whole(flat)
        encoded = pc.dictionary_encode(flat, null_encoding="encode")
        numbers = np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64)
        joined = numbers if codes is None else codes * (len(encoded.dictionary) + 1) + numbers
        codes = np.unique(joined, return_inverse=True)[1].astype(np.int64)
    return codes if codes is not None else np.zeros(0, np.int64)
