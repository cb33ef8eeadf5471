"""Sums over workers: right for messages of any size, through memory only where all of them share it."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from models import hostsum
from models.hostsum import WorkerSum
from tests.groups import run_group

SEGMENT_BYTES = 1 << 12
# The sizes of the tensors of each turn: within a segment, over its end, over several.
TURNS = [
    ([5], torch.int64),
    ([9000, 3], torch.int32),
    ([1], torch.int32),
    ([4000], torch.int64),
    ([500, 0, 12, 4000, 7], torch.int64),
]


def message(rank: int, turn: int) -> list[torch.Tensor]:
    sizes, dtype = TURNS[turn]
    random = torch.Generator().manual_seed(100 * turn + rank)
    return [torch.randint(-(2**28), 2**28, (size,), generator=random, dtype=dtype) for size in sizes]


def _sums(rank: int, workers: int, port: int, elsewhere: int | None, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    hostsum._SEGMENT_BYTES = SEGMENT_BYTES
    if rank == elsewhere:
        hostsum._mapped = lambda name: None
    over_workers = WorkerSum()
    found = []
    for turn, (_, dtype) in enumerate(TURNS):
        given = message(rank, turn)
        summed = [torch.zeros_like(tensor) for tensor in given]
        for index, place, stretch in over_workers.stretches(given, dtype):
            summed[index][place] = stretch
        found.append(summed)
    torch.save((bool(over_workers._sets), found), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def sums(workers: int, folder: Path, elsewhere: int | None = None) -> list[tuple[bool, list[list[torch.Tensor]]]]:
    """For each worker, whether memory was shared, and the sums turn by turn; nothing may be left behind."""
    before = set(Path("/dev/shm").iterdir())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_group(_sums, (workers, port, elsewhere, str(folder)), workers)
    assert not [path for path in set(Path("/dev/shm").iterdir()) - before if path.name.startswith("shoal")]
    return [torch.load(folder / f"{rank}.pt") for rank in range(workers)]


@pytest.mark.parametrize(("workers", "elsewhere"), [(2, None), (3, None), (2, 0), (2, 1)])
def test_every_worker_gets_the_sum_from_memory_only_if_all_share_it(
    workers: int, elsewhere: int | None, tmp_path: Path
) -> None:
    for shared, found in sums(workers, tmp_path, elsewhere):
        assert shared == (elsewhere is None)
        for turn, summed in enumerate(found):
            for index, tensor in enumerate(summed):
                expected = torch.stack([message(rank, turn)[index] for rank in range(workers)]).sum(0)
                assert torch.equal(tensor, expected.to(tensor.dtype))


def test_memory_that_is_not_there_is_not_reserved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hostsum._reserved(2**60) is None
    monkeypatch.setattr(hostsum, "_FOLDER", tmp_path / "nowhere")
    assert hostsum._reserved(1) is None


def test_what_a_killed_worker_left_is_cleared_away_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hostsum, "_FOLDER", tmp_path)
    left, new, other = (tmp_path / name for name in ("shoal-sum-left", "shoal-sum-new", "other"))
    for path in (left, new, other):
        path.touch()
    os.utime(left, (0, 0))
    os.utime(other, (0, 0))
    made = hostsum._reserved(1)
    assert made is not None
    assert set(tmp_path.iterdir()) == {new, other, Path(made)}
