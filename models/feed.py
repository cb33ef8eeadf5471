"""The feed: the pure function (seed, epoch, step, lane) -> microbatch.

The training set stands in chunks of `chunk_rows` rows (the last may be shorter). An epoch is:

1. A pseudo-random permutation of the chunks, dealt like cards to the L lanes: the chunk at place p goes to lane
   p mod L. The permutation is a Feistel network over the chunk numbers (Luby and Rackoff 1988; cycle walking after
   Black and Rogaway 2002), evaluated for one place in O(1): nothing is ever shuffled in memory.
2. Inside a chunk, the rows sorted by length, with the lengths jittered by a few per cent and ties broken by a keyed
   hash, so that a microbatch has little padding and yet no two epochs group a chunk's rows alike.
3. The sorted rows cut into microbatches of nearly equal size, one for each of the chunk's slots; the slots' order
   is permuted, so that lengths come mixed from step to step. The lanes share that order: all of them are at their
   short or at their long texts at the same step, so that no worker waits for another.

A step takes one slot from each lane. Which slot that is follows from (epoch, step, lane) by division, so seeking is
O(1), and nothing depends on how many workers share the lanes. Cost: where the chunks do not divide by L, the last
round leaves some lanes dry; a dry lane has weight zero. All hashing is written out here, so that the order is the
same with any library version.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_FEISTEL_ROUNDS = 6
_LENGTH_JITTER = 0.03


def mix(*values: int) -> int:
    """A 64-bit hash of integers, equal on every machine (the finaliser of SplitMix64; Steele et al. 2014)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) * 0xD1342543DE82EF95 & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def mix_range(key: int, count: int) -> NDArray[np.uint64]:
    """`count` hashes of 0, 1, ... under `key`."""
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key & _MASK)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def permute(index: int, count: int, key: int) -> int:
    """Where a pseudo-random permutation of `count` items puts `index`, in O(1) time and memory."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(key, round_number, right) & mask)
        index = left << half | right
        if index < count:
            return index


@dataclass(frozen=True)
class Place:
    """Where a lane stands at a step: a slot of a chunk, and the slot's bounds in the chunk's order."""

    chunk: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Rows of the microbatch."""
        return self.stop - self.start


@dataclass(frozen=True)
class Feed:
    """The order in which the rows of a training set are consumed; holds no state, least of all per row."""

    rows: int
    chunk_rows: int
    lanes: int
    microbatch: int
    """Rows of a microbatch at most."""
    seed: int

    def __post_init__(self) -> None:
        if min(self.rows, self.chunk_rows, self.lanes, self.microbatch) < 1:
            raise ValueError(f"rows, chunk_rows, lanes and microbatch must be at least 1: {self}")

    @property
    def chunks(self) -> int:
        """Chunks of the training set."""
        return -(-self.rows // self.chunk_rows)

    @property
    def slots(self) -> int:
        """Steps that a chunk lasts."""
        return -(-min(self.rows, self.chunk_rows) // self.microbatch)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.chunks // self.lanes) * self.slots

    def chunk_size(self, chunk: int) -> int:
        """Rows of a chunk."""
        return min(self.chunk_rows, self.rows - chunk * self.chunk_rows)

    def chunk_at(self, epoch: int, step: int, lane: int) -> int | None:
        """The chunk that lane `lane` reads at step `step` of the epoch, or None where there is none left."""
        if not 0 <= step < self.steps or not 0 <= lane < self.lanes:
            raise IndexError(f"step {step}, lane {lane} of {self.steps} steps, {self.lanes} lanes")
        dealt = step // self.slots * self.lanes + lane
        if dealt >= self.chunks:
            return None
        return permute(dealt, self.chunks, mix(self.seed, epoch, 0))

    def place(self, epoch: int, step: int, lane: int) -> Place | None:
        """What lane `lane` consumes at step `step` of the epoch, or None where it is dry."""
        chunk = self.chunk_at(epoch, step, lane)
        if chunk is None:
            return None
        size = self.chunk_size(chunk)
        filled = -(-size // self.microbatch)
        turn, slot = divmod(step, self.slots)
        part = permute(slot, self.slots, mix(self.seed, epoch, 1, turn))
        if part >= filled:
            return None
        return Place(chunk, part * size // filled, (part + 1) * size // filled)

    def lane_rows(self, epoch: int, step: int) -> list[int]:
        """Rows that each lane consumes at a step, [lanes]."""
        places = (self.place(epoch, step, lane) for lane in range(self.lanes))
        return [place.rows if place else 0 for place in places]

    def chunk_order(self, epoch: int, chunk: int, lengths: NDArray[np.integer]) -> NDArray[np.int64]:
        """The order of a chunk's rows in the epoch, [rows of the chunk]: positions within the chunk, by length.

        A `Place`'s bounds cut this order. `lengths` are the rows' token counts, in stored order.
        """
        noise = mix_range(mix(self.seed, epoch, 2, chunk), len(lengths))
        # 32 bits of noise scale the length by 1 +- jitter, exactly and alike everywhere.
        unit = (noise >> np.uint64(32)).astype(np.float64) / 2.0**32
        jittered = lengths * (1.0 + _LENGTH_JITTER * (2.0 * unit - 1.0))
        return np.lexsort((noise, jittered))

    def draw_seed(self, epoch: int, step: int, lane: int) -> int:
        """The seed of the random draws (dropout, masking) for one microbatch."""
        return mix(self.seed, epoch, 3, step, lane) >> 1
