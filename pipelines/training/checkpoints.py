"""Checkpoints in the store: sharded, written beside the training, whole or absent, and checked before they are used.

    <folder>/<steps>-<token>/__<worker>_0.distcp    the tensors that this worker wrote (torch.distributed.checkpoint)
    <folder>/<steps>-<token>/.metadata              which tensor is where
    <folder>/<steps>-<token>/history.safetensors    what grows with the run: losses, the ledger
    <folder>/<steps>-<token>/checkpoint.json        the cursor and a digest of each file, written last

As with artifacts, the record is the commit. A checkpoint that does not match its digests is not used: the one before
is. Which worker wrote what matters to nobody who reads, so any number of workers can go on from it.
"""

import contextlib
import hashlib
import io
import json
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from upath import UPath

from cluster.store import STORAGE_ERRORS, is_local, local_copy, remove_tree, write_whole
from models.settings import first_line

MANIFEST = "checkpoint.json"
HISTORY = "history.safetensors"
_KEPT = 2  # The one before serves where the last one is damaged.
_FORMAT = 1

# That a single process saves alone, as it should; set here, for filters cannot be changed for one thread.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


@dataclass(frozen=True)
class Last:
    """A checkpoint to go on from."""

    name: str
    progress: dict[str, Any]
    """As it was given to `save`."""


class Checkpoints:
    """A run's checkpoints in one folder. Every worker has one and calls the same methods in the same order."""

    def __init__(self, folder: UPath, tell: Callable[[str], None], rank: int = 0, workers: int = 1) -> None:
        """`tell` is given a sentence where a checkpoint could not be written or used."""
        self._folder, self._tell, self._rank, self._workers = folder, tell, rank, workers
        # The writing goes on beside the training, and so do its agreements.
        self._group = dist.new_group(backend="gloo") if workers > 1 else None
        # A thread begins on the first GPU, which may be another worker's.
        device = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=partial(_use_gpu, *device))
        self._writing: Future[float] | None = None
        self.seconds: float | None = None
        """What the last one cost the training: the time it stood still and that of a processor that wrote."""

    @property
    def busy(self) -> bool:
        """Whether one is still being written, by this worker's knowledge."""
        return self._writing is not None and not self._writing.done()

    def last(self) -> Last | None:
        """The last checkpoint that is whole; None where there is none."""
        found: list[Last | None] = [None]
        if self._rank == 0 and (name := self._last_whole()):
            manifest = json.loads((self._folder / name / MANIFEST).read_text(encoding="utf-8"))
            found = [Last(name, manifest["progress"])]
        if self._workers > 1:
            dist.broadcast_object_list(found, group=self._group)
        return found[0]

    def progresses(self) -> list[dict[str, Any]]:
        """What was given to `save` with those that are there, the last one first."""
        manifests = (self._folder / name / MANIFEST for name in self._whole())
        return [json.loads(manifest.read_text(encoding="utf-8"))["progress"] for manifest in manifests]

    def load(self, last: Last, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loads a checkpoint into `state`'s tensors; gives the history."""
        with local_copy(self._folder / last.name) as folder:
            state_dict_loader.load(dict(state), checkpoint_id=folder, no_dist=True)
            return dict(load_tensors((folder / HISTORY).read_bytes()))

    def save(
        self, steps: int, state: Mapping[str, Tensor], progress: Mapping[str, Any], history: Mapping[str, Tensor]
    ) -> None:
        """Copies everything aside and writes it while the training goes on; `steps` orders the checkpoints."""
        self.wait()
        started = time.monotonic()
        staged = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
        # As text, for what it refers to changes while it is written.
        rest = (json.dumps(progress), {name: tensor.cpu() for name, tensor in history.items()})
        names = [f"{steps:012d}-{uuid.uuid4().hex[:8]}"]
        if self._workers > 1:
            dist.broadcast_object_list(names, group=self._group)
        writer = _DigestingWriter(self._folder / names[0])
        stood = time.monotonic() - started
        self._writing = self._thread.submit(self._write, writer, staged, rest, stood)

    def wait(self) -> bool:
        """Waits until the last one is written or has failed, which is told; whether it was, on all workers alike."""
        if self._writing is None:
            return True
        writing, self._writing = self._writing, None
        try:
            self.seconds = writing.result()
            return True
        except (Exception, CheckpointException) as error:  # Whatever it was, the one before is still there.
            if self._rank == 0:
                self._tell(f"a checkpoint could not be written to {self._folder}: {_reason(error)}; the next is tried")
            return False

    def _write(
        self, writer: "_DigestingWriter", staged: dict[str, Tensor], rest: tuple[Any, Any], stood: float
    ) -> float:
        began = time.thread_time()
        try:
            self._written(writer, staged, *rest)
        except (Exception, CheckpointException):
            if self._rank == 0:
                remove_tree(writer.folder)  # The next one may need its room.
            raise
        if self._rank == 0:
            with contextlib.suppress(*STORAGE_ERRORS):  # There is time for that later.
                for old in self._whole()[_KEPT:]:
                    remove_tree(self._folder / old)
        return stood + time.thread_time() - began

    def _written(
        self, writer: "_DigestingWriter", staged: dict[str, Tensor], progress: str, history: dict[str, Tensor]
    ) -> None:
        # What fails on one worker alone inside of this is raised on all of them.
        state_dict_saver.save(staged, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        gathered: list[Any] = [None] * self._workers
        if self._group is None:
            gathered = [writer.files]
        else:
            dist.all_gather_object(gathered, writer.files, group=self._group)
        failed: list[str | None] = [None]
        if self._rank == 0:
            try:
                files = {name: file for each in gathered for name, file in each.items()}
                self._commit(writer.folder, files, progress, history)
            except Exception as error:
                failed = [_reason(error)]
        if self._group is not None:
            dist.broadcast_object_list(failed, group=self._group)
        if failed[0] is not None:
            raise OSError(failed[0])

    def _commit(self, folder: UPath, files: dict[str, Any], progress: str, history: dict[str, Tensor]) -> None:
        content = save_tensors(history)
        (folder / HISTORY).write_bytes(content)
        files = {**files, HISTORY: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
        manifest = {"format": _FORMAT, "workers": self._workers, "files": files, "progress": json.loads(progress)}
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))

    def _whole(self) -> list[str]:
        """Names of those that have a record, the last one first."""
        self._folder.fs.invalidate_cache()
        if not self._folder.exists():
            return []
        return sorted((entry.name for entry in self._folder.iterdir() if (entry / MANIFEST).exists()), reverse=True)

    def _last_whole(self) -> str | None:
        """The last one whose files are what was written; those after it are removed, and what is left of kills."""
        found, damaged = self._whole(), []
        chosen = None
        for name in found:
            wrong = _damage(self._folder / name)
            if wrong is None:
                chosen = name
                break
            damaged.append((name, wrong))
        for name, wrong in damaged:
            instead = f"the one before, {self._folder / chosen}," if chosen else "the beginning"
            self._tell(f"the checkpoint {self._folder / name} is damaged ({wrong}); training goes on from {instead}")
        if self._folder.exists():
            for entry in self._folder.iterdir():
                if entry.name not in found or entry.name in dict(damaged):
                    remove_tree(entry)
        return chosen


def _damage(folder: UPath) -> str | None:
    """What is wrong with a checkpoint's files; None where nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
        if manifest["format"] != _FORMAT:
            return f"{MANIFEST} is of another version"
    except (ValueError, KeyError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, wanted in files:
        try:
            if (size := (folder / name).stat().st_size) != wanted["bytes"]:
                return f"{name} has {size:,} bytes instead of {wanted['bytes']:,}"
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != wanted["sha256"]:
                    return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


class _DigestingWriter(FsspecWriter):
    """Writes a worker's files and keeps their sizes and digests, as they went out."""

    def __init__(self, folder: UPath) -> None:
        local = is_local(folder)
        self.folder = folder
        super().__init__(folder.path if local else str(folder), sync_files=local)
        self.files: dict[str, dict[str, Any]] = {}
        self.fs: Any = _DigestingFiles(self.files)
        self.fs.fs = folder.fs

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """As torch does; but an error must go to the other workers, and not all can."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise OSError(_reason(error)) from None


class _DigestingFiles(FileSystem):
    def __init__(self, files: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self._files = files

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            digesting = _DigestingStream(stream)
            try:
                yield digesting
            except Exception:
                # Torch's writer tells of a wrong position where writing failed.
                if digesting.error:
                    raise digesting.error from None
                raise
        self._files[Path(str(path)).name] = {"bytes": digesting.bytes, "sha256": digesting.digest.hexdigest()}

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self._files[Path(str(new_path)).name] = self._files.pop(Path(str(path)).name)


class _DigestingStream(io.RawIOBase):
    """Hands on what is written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.digest, self.bytes = stream, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._stream.write(view)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(view)
        self.bytes += len(view)
        return len(view)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        return int(self._stream.fileno())


def _use_gpu(device: int | None = None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


def _reason(error: BaseException) -> str:
    """The innermost cause, in a line: torch wraps what a worker met with its traceback."""
    failures = getattr(error, "failures", None)
    if failures:
        wrapped = next(iter(failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
