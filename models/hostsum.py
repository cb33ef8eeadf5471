"""All-reduce among processes of one host through memory that they share.

On CPUs torch's all-reduce (gloo) goes through the network stack even where all workers are on one host: of a small
model's training step that takes a fourteenth. Here each worker writes its numbers into a segment of its own, adds up
its share of the positions over all segments, and reads everybody's share.
"""

import mmap
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_FOLDER = Path("/dev/shm")
_SEGMENT_BYTES = 1 << 24
_SETS = 2


class HostSum:
    """Adds up tensors over the workers of the default process group, if they are all on one host.

    It takes 32 MiB a worker, made at the first call: a file in /dev/shm that has no name once all have opened it, so
    it goes with the last of them.
    """

    def __init__(self) -> None:
        self._sets: list[list[Tensor]] | None = None
        self._turn = 0

    def all_reduce(self, flat: Tensor) -> bool:
        """Adds up `flat` over the workers, in place; False, and nothing done, where there is no memory to share.

        `flat` has one dimension and as many elements, of one type, on all workers, each of which must call this.
        """
        if self._sets is None:
            self._sets = _shared_segments(dist.get_rank(), dist.get_world_size())
        if not self._sets:
            return False
        rank, workers = dist.get_rank(), dist.get_world_size()
        for piece in flat.split(_SEGMENT_BYTES // flat.element_size()):
            # While one worker still reads this set, another may begin to write the other one, but not this again.
            self._turn = (self._turn + 1) % _SETS
            segments = [memory[: piece.nbytes].view(piece.dtype) for memory in self._sets[self._turn]]
            segments[rank].copy_(piece)
            dist.barrier()
            share = slice(rank * len(piece) // workers, (rank + 1) * len(piece) // workers)
            for other in segments[1:]:
                segments[0][share] += other[share]
            dist.barrier()
            piece.copy_(segments[0])
        return True


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
        room = os.statvfs(_FOLDER)
        if size > room.f_bavail * room.f_frsize // 2:  # Ray's object store lives there too.
            return None
        descriptor, name = tempfile.mkstemp(prefix="shoal-sum-", dir=_FOLDER)
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
