"""Checkpoints: any number of workers goes on from them, and one that is not what was written is never used."""

import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.optim import AdamW
from upath import UPath

from models.checkpoints import training_state
from pipelines.training.checkpoints import MANIFEST, Checkpoints
from tests.groups import run_group

PARTS = {"losses": torch.arange(5, dtype=torch.float64)}


def make(seed: int, steps: int = 3, width: int = 8) -> tuple[nn.Module, AdamW]:
    """A network and its optimizer after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 2))
    optimizer = AdamW(model.parameters(), fused=True)
    for _ in range(steps):
        model(torch.ones(1, width)).sum().backward()
        optimizer.step()
    return model, optimizer


def values(seed: int, steps: int = 3) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in training_state(*make(seed, steps)).items()}


def assert_is(state: dict[str, torch.Tensor], seed: int, steps: int = 3) -> None:
    wanted = values(seed, steps)
    assert state.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []


def saved(folder: UPath, *seeds: int) -> list[Path]:
    """A checkpoint for each seed, at steps 1, 2, ...; gives their folders, the last one first."""
    told: list[str] = []
    checkpoints = Checkpoints(folder, told.append)
    for steps, seed in enumerate(seeds, 1):
        checkpoints.save(steps, training_state(*make(seed)), {"step": steps}, PARTS)
        checkpoints.wait()
    assert told == []
    return sorted((Path(entry.path) for entry in folder.iterdir()), reverse=True)


def resume(
    folder: UPath, state: dict[str, torch.Tensor], tell: Callable[[str], None] = print
) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """Loads the last checkpoint into `state`; gives the progress and the history, or None where there is none."""
    checkpoints = Checkpoints(folder, tell)
    last = checkpoints.last()
    return (last.progress, checkpoints.load(last, state)) if last else None


def _worker(rank: int, workers: int, port: int, folder: str, seed: int | None) -> None:
    """Saves what `seed` makes, or restores it and compares."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    checkpoints = Checkpoints(UPath(folder), print, rank, workers)
    if seed is None:
        state = training_state(*make(99, steps=0))
        last = checkpoints.last()
        assert last is not None
        assert last.progress == {"step": 7}
        checkpoints.load(last, state)
        assert_is(state, 1)
    else:
        checkpoints.save(7, training_state(*make(seed)), {"step": 7}, PARTS)
        checkpoints.wait()
    dist.destroy_process_group()


def with_workers(workers: int, folder: Path, seed: int | None = None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run_group(_worker, (workers, port, str(folder), seed), workers)


@pytest.mark.parametrize(("before", "after"), [(3, 2), (1, 3)])
def test_any_number_of_workers_goes_on_from_what_any_number_wrote(before: int, after: int, tmp_path: Path) -> None:
    with_workers(before, tmp_path, seed=1)
    (folder,) = tmp_path.iterdir()
    sizes = [file.stat().st_size for file in folder.glob("*.distcp")]
    assert len(sizes) == before, "each worker writes its part"
    with_workers(after, tmp_path)
    state = training_state(*make(99, steps=0))
    assert resume(UPath(tmp_path), state)
    assert_is(state, 1)


class UnpicklableError(Exception):
    def __reduce__(self) -> str:
        raise TypeError("not to be sent")


def _unlucky_worker(rank: int, workers: int, port: int, folder: str) -> None:
    """The last worker's part of the first checkpoint cannot be written; that of the second can."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    told: list[str] = []
    own = Checkpoints(UPath(folder), told.append, rank, workers)
    write = FsspecWriter.write_data

    def fail(*_: object) -> None:
        raise UnpicklableError("the disk is on fire")

    if rank == workers - 1:
        FsspecWriter.write_data = fail
    own.save(1, training_state(*make(1)), {"step": 1}, PARTS)
    assert not own.wait()
    FsspecWriter.write_data = write
    own.save(2, training_state(*make(1)), {"step": 7}, PARTS)
    assert own.wait()
    assert len(told) == (1 if rank == 0 else 0)
    assert all("the disk is on fire" in sentence for sentence in told)
    dist.destroy_process_group()


def test_what_one_worker_cannot_write_fails_on_all_and_the_next_is_tried(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run_group(_unlucky_worker, (2, port, str(tmp_path)), 2)
    assert [folder.name.partition("-")[0] for folder in tmp_path.iterdir()] == ["000000000002"]
    with_workers(2, tmp_path)


def test_a_run_without_checkpoints_begins_at_the_beginning(tmp_path: Path) -> None:
    assert resume(UPath(tmp_path / "none"), {}, print) is None


def test_it_works_on_s3(bucket: str) -> None:
    folder = UPath(bucket) / "run" / "checkpoints"
    checkpoints = Checkpoints(folder, print)
    checkpoints.save(1, training_state(*make(1)), {"step": 1}, PARTS)
    checkpoints.wait()
    state = training_state(*make(99, steps=0))
    restored = resume(folder, state, print)
    assert restored is not None
    assert torch.equal(restored[1]["losses"], PARTS["losses"])
    assert_is(state, 1)


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    kept = saved(UPath(tmp_path), 1, 2, 3, 4)
    assert [folder.name.partition("-")[0] for folder in kept] == ["000000000004", "000000000003"]


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _corrupt(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "history.safetensors", MANIFEST])
@pytest.mark.parametrize("damage", [_truncate, _corrupt, Path.unlink])
def test_a_damaged_one_is_told_and_the_one_before_is_used(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    last, before = saved(UPath(tmp_path), 1, 2)
    if name == MANIFEST and damage is not _truncate:
        pytest.skip("without a record it is none; what a record says is not digested")
    damage(last / name)
    told: list[str] = []
    state = training_state(*make(99, steps=0))
    restored = resume(UPath(tmp_path), state, told.append)
    assert restored is not None
    assert restored[0] == {"step": 1}
    assert_is(state, 1)
    (sentence,) = told
    assert f"the checkpoint {last} is damaged ({name} " in sentence
    assert f"goes on from the one before, {before}" in sentence


def test_where_all_are_damaged_it_begins_anew(tmp_path: Path) -> None:
    for folder in saved(UPath(tmp_path), 1, 2):
        _corrupt(folder / "__0_0.distcp")
    told: list[str] = []
    assert resume(UPath(tmp_path), training_state(*make(99)), told.append) is None
    assert len(told) == 2
    assert all("goes on from the beginning" in sentence for sentence in told)


def test_what_a_kill_left_is_no_checkpoint(tmp_path: Path) -> None:
    last, before = saved(UPath(tmp_path), 1, 2)
    (last / MANIFEST).unlink()
    state = training_state(*make(99, steps=0))
    told: list[str] = []
    assert resume(UPath(tmp_path), state, told.append)
    assert_is(state, 1)
    assert told == []
    assert list(tmp_path.iterdir()) == [before]


def test_a_full_disk_is_told_and_the_next_one_is_tried(small_disk: Path) -> None:
    told: list[str] = []
    checkpoints = Checkpoints(UPath(small_disk), told.append)
    for steps in (1, 2, 3):
        if steps == 3:
            subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
        checkpoints.save(steps, training_state(*make(steps)), {"step": steps}, PARTS)
        checkpoints.wait()
    (sentence,) = told
    assert f"a checkpoint could not be written to {small_disk}: " in sentence
    assert "No space left on device" in sentence
    state = training_state(*make(99, steps=0))
    restored = resume(UPath(small_disk), state, told.append)
    assert restored is not None
    assert restored[0] == {"step": 3}
    assert_is(state, 3)


def test_training_goes_on_while_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    write = Checkpoints._write

    def slowly(self: Checkpoints, *arguments: object) -> float:
        begun.set()
        assert go_on.wait(30)
        return write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoints, "_write", slowly)
    model, optimizer = make(1)
    checkpoints = Checkpoints(UPath(tmp_path), print)
    checkpoints.save(1, training_state(model, optimizer), {}, PARTS)
    assert begun.wait(30)
    assert checkpoints.busy
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    go_on.set()
    checkpoints.wait()
    state = training_state(*make(99, steps=0))
    assert resume(UPath(tmp_path), state)
    assert_is(state, 1)
