"""An output of any size that appears whole or not at all: one Parquet file, a folder of them, or one csv file.

It is written under another name and renamed at the end. An object store has no renaming: there a file is written on
this machine first and sent at the end, and a folder is whole when it holds `_SUCCESS`, which is sent last. The other
name follows from the target's, so that the next try removes what a killed one left.
"""

import contextlib
import csv
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from cluster.store import is_local, remove_tree, telling_storage_errors, upload_tree
from pipelines.predicting.tables import texts_of
from pipelines.preparing.cells import holds_bytes

Kind = Literal["parquet", "csv", "folder"]
_FILE_ROWS = 2**20
_SUCCESS = "_SUCCESS"
_FILE = re.compile(r"part-\d{5}\.parquet")


class Writer(Protocol):
    """Takes tables of one schema, in order."""

    def write(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


def kind_of(target: UPath) -> Kind:
    """What is written there, by its name's ending."""
    kinds: dict[str, Kind] = {".parquet": "parquet", ".csv": "csv"}
    return kinds.get(target.suffix.lower(), "folder")


def is_there(target: UPath) -> bool:
    """Whether there is something at `target` that is not the unfinished output of an earlier try."""
    if is_local(target):
        return target.exists()
    # A folder without its marker is unfinished; but what is no output of ours is not for us to overwrite.
    return (target / _SUCCESS).exists() or any(
        not _FILE.fullmatch(name[len(target.path) :].lstrip("/")) for name in target.fs.find(target.path)
    )


@contextlib.contextmanager
def whole_output(target: UPath, kind: Kind, schema: pa.Schema) -> Iterator[Writer]:
    """A writer; what it wrote stands at `target` when the block ends without an error, and nowhere else."""
    if is_local(target):
        final = Path(target.path)
        final.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(final.with_name(f".{final.name}.unfinished")) as partial:
            with _written(partial, kind, schema, "--out PATH") as writer:
                yield writer
            partial.replace(final)
        return
    digest = hashlib.sha256(f"{os.getuid()} {target}".encode()).hexdigest()[:16]
    with _scratch(Path(tempfile.gettempdir()) / f"shoal-{digest}") as folder:
        folder.mkdir(mode=0o700)
        local = folder / target.name
        with _written(local, kind, schema, "TMPDIR=PATH") as writer:
            yield writer
        if kind == "folder":
            remove_tree(target)
            upload_tree(local, target)
            (target / _SUCCESS).write_bytes(b"")
        else:
            target.fs.put_file(str(local), target.path)


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A name that is free while the block begins and when it has ended."""
    _remove(path)
    try:
        yield path
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _written(path: Path, kind: Kind, schema: pa.Schema, setting: str) -> Iterator[Writer]:
    """A writer at `path`, which `setting` chooses: what goes wrong there is told as this place's fault."""
    with telling_storage_errors(str(path.parent), setting):
        writer = _Told({"parquet": _parquet, "csv": _Csv, "folder": _Folder}[kind](path, schema), path, setting)
    try:
        yield writer
    finally:
        writer.close()


@dataclass(frozen=True)
class _Told:
    writer: Writer
    path: Path
    setting: str

    def write(self, table: pa.Table) -> None:
        with telling_storage_errors(str(self.path.parent), self.setting):
            self.writer.write(table)

    def close(self) -> None:
        with telling_storage_errors(str(self.path.parent), self.setting):
            self.writer.close()


def _parquet(path: Path, schema: pa.Schema) -> Any:
    return pq.ParquetWriter(path, schema)


class _Folder:
    """Parquet files of about a million rows each, named in their order."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema, self.files, self.rows = path, schema, 0, 0
        path.mkdir()
        self.current = self._next()

    def _next(self) -> Any:
        writer = pq.ParquetWriter(self.path / f"part-{self.files:05d}.parquet", self.schema)
        self.files, self.rows = self.files + 1, 0
        return writer

    def write(self, table: pa.Table) -> None:
        if self.rows >= _FILE_ROWS:
            self.current.close()
            self.current = self._next()
        self.current.write_table(table)
        self.rows += len(table)

    def close(self) -> None:
        self.current.close()


class _Csv:
    """A header and lines; null is an empty field, a list its items joined by commas, else nested values JSON."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.file = path.open("w", encoding="utf-8", newline="")
        self.lines = csv.writer(self.file, lineterminator="\n")
        self.lines.writerow(schema.names)

    def write(self, table: pa.Table) -> None:
        self.lines.writerows(zip(*(_fields(column) for column in table.columns), strict=True))

    def close(self) -> None:
        self.file.close()


def _fields(column: pa.ChunkedArray) -> list[str | None]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_list(kind) and pa.types.is_string(kind.value_type):
        return [None if value is None else ",".join(item or "" for item in value) for value in column.to_pylist()]
    if pa.types.is_nested(kind) or holds_bytes(kind) or isinstance(kind, pa.BaseExtensionType):
        return texts_of(column)
    fields: list[str | None] = column.cast(pa.string()).to_pylist()
    return fields
