"""Reading microbatches: the feed says which rows, this fetches them a chunk at a time."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from models.distillation import TEACHER
from models.feed import Feed
from models.labels import LabelColumn
from models.microbatch import Batch
from models.objectives import MISSING
from pipelines.prepared import Prepared, SplitIndex
from pipelines.training.soft_targets import SoftTargets

_MOST_ROWS = 4096


@dataclass(frozen=True)
class Ragged:
    """Lists of unequal length in one flat array: item i is `values[offsets[i]:offsets[i + 1]]`."""

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "Ragged":
        """An Arrow list column."""
        array = column.combine_chunks()
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        offsets = array.offsets.to_numpy().astype(np.int64)
        values = array.values.to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(values, offsets)

    def padded(self, items: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        """The items as [items, width], zeros after each."""
        starts, lengths = self.offsets[items], self.offsets[items + 1] - self.offsets[items]
        mask = np.arange(width) < lengths[:, None]
        out = np.zeros(mask.shape, dtype=np.int64)
        out[mask] = self.values[(starts[:, None] + np.arange(width))[mask]]
        return out


@dataclass(frozen=True)
class Chunk:
    """The rows of one chunk, ready to be cut into microbatches."""

    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    input_ids: Ragged
    token_types: Ragged | None
    labels: Mapping[str, NDArray[Any]]
    """For each column class indices [rows], or for a multi-label one zeros and ones [rows, classes]; -1: missing. A
    teacher's logits stand among them (`models.distillation.TEACHER`)."""

    def batch(self, items: NDArray[np.int64], pad: int = 0) -> Batch:
        """The chunk's rows `items` (positions in the chunk) as one padded batch."""
        lengths = self.lengths[items]
        width = int(lengths.max())
        mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
        ids = self.input_ids.padded(items, width)
        if pad:
            ids[mask == 0] = pad
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if self.token_types is not None:
            inputs["token_type_ids"] = torch.from_numpy(self.token_types.padded(items, width))
        labels = {name: torch.from_numpy(values[items]) for name, values in self.labels.items()}
        return Batch(inputs, labels, self.rows[items].tolist(), weight=len(items))


def feed_over(split: SplitIndex, lanes: int, microbatch: int, seed: int) -> Feed:
    """The feed over a stored split, where stored chunks that stand side by side may make up one of the feed's.

    The more rows are sorted by length together, the less padding; but the lanes must still have equally many chunks,
    so that no steps are added.
    """
    most = max(_MOST_ROWS // split.chunk_rows, 1)
    feeds = (Feed(split.rows, split.chunk_rows * stored, lanes, microbatch, seed) for stored in range(1, most + 1))
    return min(feeds, key=lambda feed: (feed.steps, -feed.chunk_rows))


def read_feed_chunk(prepared: Prepared, feed: Feed, number: int, teacher: SoftTargets | None = None) -> Chunk:
    """One of the feed's chunks of the training set, with what a teacher said of its rows."""
    stored = feed.chunk_rows // prepared.index.splits["train"].chunk_rows
    chunk = read_chunk(prepared, "train", number * stored, stored)
    if teacher is None:
        return chunk
    return replace(chunk, labels={**chunk.labels, TEACHER: teacher.read(number * stored, stored)})


def read_chunk(prepared: Prepared, split: str, first: int, count: int = 1) -> Chunk:
    """`count` stored chunks of a prepared split from `first` on, or as many as there are, as one."""
    index = prepared.index
    names = ["row", "length", "input_ids", *(f"label:{column.name}" for column in index.labels)]
    if index.pair:
        names.append("token_type_ids")
    last = min(first + count, index.splits[split].chunks)
    table = pa.concat_tables([prepared.read_chunk(split, number, names) for number in range(first, last)])
    return Chunk(
        rows=table["row"].to_numpy().astype(np.int64),
        lengths=table["length"].to_numpy().astype(np.int64),
        input_ids=Ragged.of(table["input_ids"]),
        token_types=Ragged.of(table["token_type_ids"]) if index.pair else None,
        labels={column.name: read_labels(table[f"label:{column.name}"], column) for column in index.labels},
    )


def read_labels(values: pa.ChunkedArray, column: LabelColumn) -> NDArray[np.int64]:
    """A stored label column as `Chunk.labels` holds it."""
    if not column.multi:
        return np.asarray(values.to_numpy(), dtype=np.int64)
    ragged = Ragged.of(values)
    marks = np.zeros((len(ragged.offsets) - 1, len(column.classes)), dtype=np.int64)
    marks[np.repeat(np.arange(len(marks)), np.diff(ragged.offsets)), ragged.values[ragged.offsets[0] :]] = 1
    marks[values.is_null().to_numpy()] = MISSING
    return marks


class Rows(Protocol):
    """A chunk, as far as its reader needs to know it."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Of its rows, in tokens."""
        ...


Kind = TypeVar("Kind", bound=Rows)


class LaneReader(Generic[Kind]):
    """Gives the microbatches of some lanes; holds one chunk a lane and reads the next one ahead."""

    def __init__(
        self,
        feed: Feed,
        read: Callable[[int], Kind],
        lanes: Sequence[int],
        batch: Callable[[Kind, NDArray[np.int64], tuple[int, int, int]], Batch],
    ) -> None:
        """`batch` makes a microbatch of a chunk's rows at some positions, for (epoch, step, lane)."""
        self._feed, self._read, self._lanes, self._make = feed, read, tuple(lanes), batch
        self._open: dict[int, tuple[int, int, Kind, NDArray[np.int64]]] = {}
        self._ahead: dict[int, tuple[int, Future[Kind]]] = {}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chunks")

    def batch(self, epoch: int, step: int, lane: int) -> Batch | None:
        """The microbatch at (epoch, step, lane), or None where the lane is dry."""
        place = self._feed.place(epoch, step, lane)
        if place is None:
            return None
        if self._open.get(lane, (None, None))[:2] != (epoch, place.chunk):
            chunk = self._take(lane, place.chunk)
            self._open[lane] = (epoch, place.chunk, chunk, self._feed.chunk_order(epoch, place.chunk, chunk.lengths))
            self._look_ahead(epoch, step, lane)
        _, _, chunk, order = self._open[lane]
        return self._make(chunk, order[place.start : place.stop], (epoch, step, lane))

    def _take(self, lane: int, number: int) -> Kind:
        ahead = self._ahead.pop(lane, None)
        if ahead and ahead[0] == number:
            return ahead[1].result()
        return self._read(number)

    def _look_ahead(self, epoch: int, step: int, lane: int) -> None:
        turn_end = (step // self._feed.slots + 1) * self._feed.slots
        if turn_end >= self._feed.steps:
            epoch, turn_end = epoch + 1, 0
        number = self._feed.chunk_at(epoch, turn_end, lane)
        if number is not None:
            self._ahead[lane] = (number, self._pool.submit(self._read, number))


def text_batches(
    prepared: Prepared, feed: Feed, lanes: Sequence[int], pad: int = 0, teacher: SoftTargets | None = None
) -> Callable[[int, int, int], Batch | None]:
    """The microbatches of labelled texts at (epoch, step, lane), for some lanes; with a teacher's logits."""

    def read(number: int) -> Chunk:
        return read_feed_chunk(prepared, feed, number, teacher)

    return LaneReader(feed, read, lanes, lambda chunk, items, _: chunk.batch(items, pad)).batch
