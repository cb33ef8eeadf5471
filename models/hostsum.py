"""All-reduce among processes of one host through memory that they share.

On CPUs torch's all-reduce (gloo) goes through the network stack even where all workers are on one host: of a small
model's training step that takes a twelfth. Here each worker writes its numbers into a segment of its own, adds up
its share of the positions over all segments, and reads everybody's share: as much copying as adding takes.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_FOLDER = Path("/dev/shm")
_SPARE = 1.25


class HostSum:
    """Adds up tensors of one type over the workers of the default process group, if they are all on one host.

    The memory is a file in /dev/shm that has no name once all have opened it, so it goes with the last of them. It is
    made at the first need and again whenever a message has outgrown it.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._segments: list[Tensor] = []
        self._possible = True

    def all_reduce(self, parts: Sequence[Tensor]) -> Tensor | None:
        """The sum over the workers of `parts` laid end to end, flat; None where there is no memory to share.

        The parts have this object's type and as many elements on all workers, each of which must call this. The sum
        stands in the shared memory: it is to be read only, and until the next call.
        """
        count = sum(part.numel() for part in parts)
        if self._possible and (not self._segments or len(self._segments[0]) < count):
            self._segments = self._opened(int(count * _SPARE))
            self._possible = bool(self._segments)
        if not self._possible:
            return None
        rank, workers = dist.get_rank(), dist.get_world_size()
        segments = [segment[:count] for segment in self._segments]
        dist.barrier()  # All have read the sum before.
        torch.cat([part.reshape(-1) for part in parts], out=segments[rank])
        dist.barrier()
        share = slice(rank * count // workers, (rank + 1) * count // workers)
        for segment in segments[1:]:
            segments[0][share] += segment[share]
        dist.barrier()
        return segments[0]

    def _opened(self, count: int) -> list[Tensor]:
        """Each worker's segment of `count` elements; none, on all workers alike, where one of them cannot open it."""
        rank, workers = dist.get_rank(), dist.get_world_size()
        size = count * self._dtype.itemsize * workers
        names = [_reserved(size) if rank == 0 else None]
        dist.broadcast_object_list(names)
        memory = _mapped(names[0], size) if names[0] else None
        everywhere = torch.tensor(memory is not None, dtype=torch.int32)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        if rank == 0 and names[0]:
            Path(names[0]).unlink(missing_ok=True)
        if memory is None or not everywhere:
            return []
        return list(torch.frombuffer(memory, dtype=self._dtype).split(count))


def _reserved(size: int) -> str | None:
    """A new file of `size` bytes that are sure to be there: writing to memory that is not would kill the process."""
    try:
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


def _mapped(name: str, size: int) -> mmap.mmap | None:
    """The file's memory; None on another host, where there is no such file."""
    try:
        descriptor = os.open(name, os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
