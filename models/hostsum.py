"""Sums over workers; among processes of one host, through memory that they share.

On CPUs torch's all-reduce (gloo) goes through the network stack even where all workers are on one host: of a small
model's training step that takes a fourteenth. Here each worker writes its numbers into a segment of its own, adds up
its share of the positions over all segments, and everybody reads all shares where they are.
"""

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_FOLDER = Path("/dev/shm")
_SEGMENT_BYTES = 1 << 24
_SETS = 2
_PREFIX = "shoal-sum-"
_ABANDONED_SECONDS = 3600


class WorkerSum:
    """Adds up tensors over the workers of the default process group: through memory where all are on one host.

    That takes 32 MiB a worker, made at the first call: a file in /dev/shm that has no name once all have opened it,
    so it goes with the last of them.
    """

    def __init__(self) -> None:
        self._sets: list[list[Tensor]] | None = None
        self._turn = 0

    def stretches(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[int, slice, Tensor]]:
        """The sums, a stretch at a time: the tensor's index, the place in it, and the sum there as `dtype`.

        A stretch is to be used before the next one is asked for: its memory is used again. `tensors` have one
        dimension and are as many and as large on all workers, each of which must ask for all stretches.
        """
        if not tensors:
            return
        on_host = tensors[0].device.type == "cpu"
        if on_host and self._sets is None:
            self._sets = _shared_segments(dist.get_rank(), dist.get_world_size())
        add_up = self._through_memory if on_host and self._sets else _through_network
        for bucket in _buckets([len(tensor) for tensor in tensors], _SEGMENT_BYTES // dtype.itemsize):
            total = add_up([tensors[index][place] for index, place in bucket], dtype)
            sums = total.split([place.stop - place.start for _, place in bucket])
            for (index, place), summed in zip(bucket, sums, strict=True):
                yield index, place, summed

    def _through_memory(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        assert self._sets
        rank, workers = dist.get_rank(), dist.get_world_size()
        count = sum(map(len, parts))
        # While one worker still reads this set, another may begin to write the other one, but not this again.
        self._turn = (self._turn + 1) % _SETS
        segments = [memory.view(dtype)[:count] for memory in self._sets[self._turn]]
        for own, part in zip(segments[rank].split([len(part) for part in parts]), parts, strict=True):
            own.copy_(part)
        dist.barrier()
        share = slice(rank * count // workers, (rank + 1) * count // workers)
        for other in segments[1:]:
            segments[0][share] += other[share]
        dist.barrier()
        return segments[0]


def _through_network(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    flat = torch.cat([part.to(dtype) for part in parts])
    dist.all_reduce(flat)
    return flat


def _buckets(sizes: Sequence[int], most: int) -> Iterator[list[tuple[int, slice]]]:
    """Stretches of tensors of these sizes, in order, in lists of at most `most` elements."""
    bucket: list[tuple[int, slice]] = []
    room = most
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            bucket.append((index, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield bucket
                bucket, room = [], most
    if bucket:
        yield bucket


def _shared_segments(rank: int, workers: int) -> list[list[Tensor]]:
    """Sets of segments, a segment for each worker; none, on all workers alike, where one of them cannot open them."""
    names = [_reserved(_SETS * workers * _SEGMENT_BYTES) if rank == 0 else None]
    try:
        dist.broadcast_object_list(names)
        memory = _mapped(names[0]) if names[0] else None
        everywhere = torch.tensor(memory is not None, dtype=torch.int32)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    finally:
        if rank == 0 and names[0]:
            Path(names[0]).unlink(missing_ok=True)
    if memory is None or not everywhere:
        return []
    segments = torch.frombuffer(memory, dtype=torch.uint8).split(_SEGMENT_BYTES)
    return [list(segments[first : first + workers]) for first in range(0, len(segments), workers)]


def _reserved(size: int) -> str | None:
    """A new file of `size` bytes that are sure to be there: writing to memory that is not would kill the process."""
    try:
        _clear_away()
        room = os.statvfs(_FOLDER)
        if size > room.f_bavail * room.f_frsize // 2:  # Ray's object store lives there too.
            return None
        descriptor, name = tempfile.mkstemp(prefix=_PREFIX, dir=_FOLDER)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        Path(name).unlink()
        return None
    finally:
        os.close(descriptor)
    return name


def _clear_away() -> None:
    """Removes files whose maker was killed before all had opened them. One that is late goes through the network."""
    for path in _FOLDER.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # Others' files are theirs.
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _mapped(name: str) -> mmap.mmap | None:
    """The file's memory; None on another host, where there is no such file, or where it cannot be had."""
    try:
        descriptor = os.open(name, os.O_RDWR)
        try:
            return mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
    except OSError:
        return None
