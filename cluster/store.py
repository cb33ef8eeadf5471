"""The store: where artifacts live, on a local disk or any filesystem that fsspec knows (s3, gs, NFS).

    <store>/<stage>/<fingerprint>/            an artifact: a stage's output folder
    <store>/<stage>/<fingerprint>/artifact.json   its record, written last: a folder without one is unfinished
    <store>/<stage>/<fingerprint>/work/           what an unfinished stage goes on from; no part of the artifact

Object stores cannot rename a folder, so the record is the commit: readers look at nothing else to decide
whether an artifact is there, and a single object or `os.replace` makes it appear whole.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError
from upath import UPath

ROLES = {"teacher": "finetune", "without_pretraining": "finetune"}
"""The stages of inputs that are called by what they are to those that build on them."""

STORAGE_ERRORS = (OSError, BotoCoreError)
"""What an unreachable or full store raises; botocore's own errors are no OSErrors."""

RECORD = "artifact.json"
WORK = "work"


class ClusterError(Exception):
    """Something about the place where Shoal runs (store, disk, Ray) is not as it must be: one sentence."""


@dataclass(frozen=True)
class Record:
    """What `artifact.json` holds: where an artifact comes from and what it measured."""

    stage: str
    fingerprint: str
    settings: dict[str, Any]
    """The stage's settings that decided the outcome."""
    inputs: dict[str, str]
    """The fingerprint of each input artifact by stage, and of the source data under `data`."""
    versions: dict[str, str]
    metrics: dict[str, Any]
    recipe: str = ""
    seconds: float = 0.0
    bytes: int = 0
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class Artifact:
    """A finished stage's output folder and its record."""

    path: UPath
    record: Record


@dataclass(frozen=True)
class Store:
    """Artifacts under one root folder or bucket prefix."""

    root: UPath

    @classmethod
    def open(cls, url: str) -> "Store":
        """Opens (and makes, where need be) the store at `url` and checks that it can be written to.

        Raises:
            ClusterError: the store cannot be reached or written.
        """
        try:
            root = UPath(url).expanduser() if "://" not in url else UPath(url)
            local = is_local(root)
            if not local:
                root.fs  # noqa: B018, the library for it is looked for here
        except (ValueError, ImportError, RuntimeError) as error:
            raise ClusterError(f"cannot open the store {url}: {error}.") from error
        if local:
            root = UPath(Path(root.path).absolute())
        with telling_storage_errors(f"the store {url}"):
            if local:  # An object store needs no folders, and s3fs would make a missing bucket.
                root.mkdir(parents=True, exist_ok=True)
            probe = root / f".probe-{uuid.uuid4().hex}"
            probe.write_bytes(b"")
            probe.unlink()
        return cls(root)

    def folder(self, stage: str, fingerprint: str) -> UPath:
        """Where the artifact stands, finished or not."""
        return self.root / stage / fingerprint

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The finished artifact, or None."""
        return read_artifact(self.folder(stage, fingerprint))

    def find_input(self, name: str, fingerprint: str) -> Artifact | None:
        """What an artifact's record calls `name` among its inputs; None also for what is no artifact."""
        return self.find(ROLES.get(name, name), fingerprint)

    def artifacts(self) -> Iterator[Artifact]:
        """Every finished artifact, stage by stage."""
        for stage in sorted(folder for folder in self.root.iterdir() if folder.is_dir()):
            for folder in sorted(stage.iterdir()):
                if artifact := read_artifact(folder):
                    yield artifact

    def commit(self, record: Record) -> Artifact:
        """Makes the folder's content an artifact by writing its record; half-written files of killed tries go."""
        folder = self.folder(record.stage, record.fingerprint)
        with telling_storage_errors(str(folder)):
            size = 0
            for entry in folder.rglob("*"):
                inside = entry.relative_to(folder).parts
                if inside[0] == WORK or not entry.is_file():
                    continue
                if entry.name.startswith("."):
                    entry.unlink()
                else:
                    size += entry.stat().st_size
            record = Record(**{**asdict(record), "bytes": size})
            write_whole(folder / RECORD, json.dumps(asdict(record), indent=2, ensure_ascii=False))
        return Artifact(folder, record)


def read_artifact(folder: UPath) -> Artifact | None:
    """The artifact at `folder`, or None where none was finished."""
    try:
        text = (folder / RECORD).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Artifact(folder, Record(**json.loads(text)))


def write_whole(path: UPath, text: str) -> None:
    """Writes a small file so that readers see all of it or none: renamed into place where files are local."""
    if not is_local(path):
        path.write_text(text, encoding="utf-8")
        return
    _written_beside(path, text).replace(path.path)


def write_new(path: UPath, text: str) -> bool:
    """Writes a small file whole where there is none yet, and leaves one that is there alone; whether it wrote."""
    if is_local(path):
        partial, local = _written_beside(path, text), Path(path.path)
        try:
            local.hardlink_to(partial)
        except FileExistsError:
            return False
        except OSError:  # The filesystem has no hard links.
            if local.exists():
                return False
            partial.replace(local)
        finally:
            partial.unlink(missing_ok=True)
        return True
    try:
        path.fs.pipe_file(path.path, text.encode(), mode="create")
    except OSError:  # Object stores differ in what they raise where the object is there.
        path.fs.invalidate_cache()
        if path.exists():
            return False
        path.write_text(text, encoding="utf-8")  # For a store without conditional writes, and to tell what is wrong.
    return True


def _written_beside(path: UPath, text: str) -> Path:
    """A hidden file on the same filesystem that holds the text, on disk."""
    local = Path(path.path)
    partial = local.with_name(f".{local.name}.{uuid.uuid4().hex}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return partial


def is_local(path: UPath) -> bool:
    """Whether `path` is on this machine's (or a mounted) filesystem."""
    return path.protocol in ("", "file")


def remove_tree(path: UPath) -> None:
    """Removes a folder and all in it, if it is there."""
    if is_local(path):
        shutil.rmtree(path.path, ignore_errors=True)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)


def upload_tree(source: Path, target: UPath) -> None:
    """Copies a local folder's content into `target`."""
    with telling_storage_errors(str(target)):
        for file in sorted(entry for entry in source.rglob("*") if entry.is_file()):
            destination = target / file.relative_to(source).as_posix()
            destination.parent.mkdir(parents=True, exist_ok=True)
            destination.fs.put_file(str(file), destination.path)


@contextlib.contextmanager
def local_copy(source: UPath) -> Iterator[Path]:
    """`source` as a local folder: itself where it is local, else a copy that is removed afterwards."""
    if is_local(source):
        yield Path(source.path)
        return
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        for entry in source.rglob("*"):
            if entry.is_file():
                target = Path(folder) / entry.relative_to(source).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                entry.fs.get_file(entry.path, str(target))
        yield Path(folder)


def sentence_of(error: BaseException) -> str:
    """What an error says, on one line and without its full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


@contextlib.contextmanager
def telling_storage_errors(what: str, setting: str = "store=PATH") -> Iterator[None]:
    """Turns a full disk, a missing permission or an unreachable bucket into one sentence about `what`.

    `setting` is how a user chooses another place for it.
    """
    try:
        yield
    except ClusterError:
        raise
    except STORAGE_ERRORS as error:
        reason = {
            errno.ENOSPC: "no space is left there; free some and run the same command again",
            errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
            errno.EACCES: f"permission is denied; choose another with `{setting}`",
            errno.EPERM: f"permission is denied; choose another with `{setting}`",
            errno.EROFS: f"the filesystem is read-only; choose another with `{setting}`",
            errno.ENOTDIR: f"a part of the path is a file, not a folder; choose another with `{setting}`",
        }.get(getattr(error, "errno", None) or 0, " ".join(str(error).split()) or type(error).__name__)
        raise ClusterError(f"cannot write to {what}: {reason.rstrip('.')}.") from error
