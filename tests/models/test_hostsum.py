"""Sums through shared memory: right for messages of any size, and refused by all where one cannot take part."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models import hostsum
from models.hostsum import HostSum

SEGMENT_BYTES = 1 << 12
TURNS = [(5, torch.int64), (9000, torch.int32), (1, torch.int32), (4000, torch.int64), (4000, torch.int64)]


def message(rank: int, turn: int) -> torch.Tensor:
    count, dtype = TURNS[turn]
    random = torch.Generator().manual_seed(100 * turn + rank)
    return torch.randint(-(2**28), 2**28, (count,), generator=random, dtype=dtype)


def _sums(rank: int, workers: int, port: int, elsewhere: int | None, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    hostsum._SEGMENT_BYTES = SEGMENT_BYTES
    if rank == elsewhere:
        hostsum._mapped = lambda name: None
    host_sum = HostSum()
    found = []
    for turn in range(len(TURNS)):
        flat = message(rank, turn)
        found.append((host_sum.all_reduce(flat), flat))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def sums(workers: int, folder: Path, elsewhere: int | None = None) -> list[list[tuple[bool, torch.Tensor]]]:
    """For each worker, turn by turn, whether it was added up, and what came out; nothing may be left behind."""
    before = set(Path("/dev/shm").iterdir())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_sums, (workers, port, elsewhere, str(folder)), nprocs=workers)
    assert not [path for path in set(Path("/dev/shm").iterdir()) - before if path.name.startswith("shoal")]
    return [torch.load(folder / f"{rank}.pt") for rank in range(workers)]


@pytest.mark.parametrize("workers", [2, 3])
def test_every_worker_gets_the_sum(workers: int, tmp_path: Path) -> None:
    for found in sums(workers, tmp_path):
        for turn, (done, summed) in enumerate(found):
            assert done
            assert torch.equal(summed, torch.stack([message(rank, turn) for rank in range(workers)]).sum(0))


@pytest.mark.parametrize("elsewhere", [0, 1])
def test_all_refuse_where_one_has_no_part_in_the_memory(elsewhere: int, tmp_path: Path) -> None:
    for rank, found in enumerate(sums(2, tmp_path, elsewhere)):
        for turn, (done, untouched) in enumerate(found):
            assert not done
            assert torch.equal(untouched, message(rank, turn))


def test_memory_that_is_not_there_is_not_reserved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hostsum._reserved(2**60) is None
    monkeypatch.setattr(hostsum, "_FOLDER", tmp_path / "nowhere")
    assert hostsum._reserved(1) is None
