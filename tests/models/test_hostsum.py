"""Sums through shared memory: right for messages of any size, and refused by all where one cannot take part."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models import hostsum
from models.hostsum import HostSum

SIZES = [(5,), (7, 3), (1,), (4000, 1, 60), (4000,)]


def message(rank: int, turn: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(100 * turn + rank)
    return [torch.randint(-(2**30), 2**30, (size,), generator=random, dtype=torch.int64) for size in SIZES[turn]]


def _sums(rank: int, workers: int, port: int, elsewhere: int | None, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    if rank == elsewhere:
        hostsum._FOLDER = Path(folder) / "nowhere"
        hostsum._mapped = lambda name, size: None
    host_sum = HostSum(torch.int64)
    found = []
    for turn in range(len(SIZES)):
        summed = host_sum.all_reduce(message(rank, turn))
        found.append(None if summed is None else summed.clone())
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def sums(workers: int, folder: Path, elsewhere: int | None = None) -> list[list[torch.Tensor | None]]:
    """What each worker got, turn by turn."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_sums, (workers, port, elsewhere, str(folder)), nprocs=workers)
    return [torch.load(folder / f"{rank}.pt") for rank in range(workers)]


@pytest.mark.parametrize("workers", [2, 3])
def test_every_worker_reads_the_sum(workers: int, tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    for found in sums(workers, tmp_path):
        for turn, summed in enumerate(found):
            expected = sum(torch.cat(message(rank, turn)) for rank in range(workers))
            assert summed is not None
            assert torch.equal(summed, expected)
    assert not [path for path in set(Path("/dev/shm").iterdir()) - before if path.name.startswith("shoal")]


@pytest.mark.parametrize("elsewhere", [0, 1])
def test_all_refuse_where_one_has_no_part_in_the_memory(elsewhere: int, tmp_path: Path) -> None:
    assert sums(2, tmp_path, elsewhere) == [[None] * len(SIZES)] * 2
