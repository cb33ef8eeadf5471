"""Moving rows from units to partitions through files: memory stays bounded, and a crash loses one task's work.

A unit's task writes one spill file, the rows of each partition side by side in it as an Arrow stream of their own,
and tells where each begins. A partition's task reads its piece of every spill file.
"""

import contextlib
import io
import itertools
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from cluster.store import is_local

_COMPRESSED = pa.ipc.IpcWriteOptions(compression="lz4")
_BATCH_ROWS = 4096


def write_spill(table: pa.Table, partitions: NDArray[np.int64], count: int, path: UPath) -> list[int]:
    """Writes the rows by partition; returns where each of the `count` pieces begins, and the end."""
    order = np.argsort(partitions, kind="stable")
    table = table.take(pa.array(order)).combine_chunks()
    bounds = np.searchsorted(partitions[order], np.arange(count + 1)).tolist()
    buffer = io.BytesIO()
    offsets = [0]
    for start, stop in itertools.pairwise(bounds):
        if stop > start:
            with pa.ipc.new_stream(buffer, table.schema, options=_COMPRESSED) as writer:
                writer.write_table(table.slice(start, stop - start))
        offsets.append(buffer.tell())
    write_bytes(path, buffer.getbuffer())
    return offsets


def read_piece(path: UPath, start: int, stop: int) -> pa.Table:
    """One partition's rows of a spill file."""
    with path.fs.open(path.path, "rb") as stream:
        stream.seek(start)
        content = stream.read(stop - start)
    return pa.ipc.open_stream(content).read_all()


def write_rows(path: UPath, table: pa.Table) -> None:
    """Writes rows so that `read_rows` can take any part of them."""
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema, options=_COMPRESSED) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=_BATCH_ROWS)
    write_bytes(path, buffer.getbuffer())


def read_rows(path: UPath, start: int, stop: int) -> pa.Table:
    """Rows `start` to `stop` of a file made by `write_rows`."""
    with path.fs.open(path.path, "rb") as stream:
        file = pa.ipc.open_file(stream)
        first, last = start // _BATCH_ROWS, -(-stop // _BATCH_ROWS)
        batches = [file.get_batch(number) for number in range(first, last)]
    return pa.Table.from_batches(batches).slice(start - first * _BATCH_ROWS, stop - start)


def write_bytes(path: UPath, content: Any) -> None:
    """Writes a file whole: a reader, or a rerun after a crash, never sees a part of it."""
    with writing_whole(path) as stream:
        stream.write(content)


def write_chunks(path: UPath, table: pa.Table, chunk_rows: int) -> None:
    """Writes rows as Parquet, a row group for each chunk of them, whole or not at all."""
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd", use_dictionary=False) as writer:
        for start in range(0, len(table), chunk_rows):
            writer.write_table(table.slice(start, chunk_rows), row_group_size=chunk_rows)
    write_bytes(path, buffer.getvalue())


@contextlib.contextmanager
def writing_whole(path: UPath) -> Iterator[Any]:
    """A stream to a file that appears when it is whole: renamed into place; object stores do so by themselves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex}") if is_local(path) else path
    with partial.fs.open(partial.path, "wb") as stream:
        yield stream
    if partial is not path:
        partial.rename(path)
