"""Soft targets: the logits that a teacher gave for each row of the training set, read by chunk as its labels are.

    000000.f32, 000001.f32 ...   the rows of so many stored chunks each, in stored order: float32 [rows, classes],
                                 little-endian

A row's place follows from its chunk's number, so nothing is kept in memory, however many rows there are.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from upath import UPath

_DTYPE = np.dtype("<f4")


@dataclass(frozen=True)
class SoftTargets:
    """A table of logits, in the order of the student's label columns and classes."""

    folder: UPath
    classes: int
    """Of all label columns."""
    rows: int
    chunk_rows: int
    file_chunks: int

    @property
    def files(self) -> range:
        """The numbers of the files."""
        return range(-(-self.rows // (self.chunk_rows * self.file_chunks)))

    def chunks(self, file: int) -> range:
        """The stored chunks whose rows stand in a file."""
        total = -(-self.rows // self.chunk_rows)
        return range(file * self.file_chunks, min((file + 1) * self.file_chunks, total))

    def write(self, file: int, logits: NDArray[np.float32]) -> None:
        """Writes a file: the logits of the rows of `chunks(file)`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(file).write_bytes(logits.astype(_DTYPE).tobytes())

    def read(self, first: int, count: int) -> NDArray[np.float32]:
        """The logits [rows, classes] of `count` stored chunks from `first` on, or of as many as there are."""
        start = first * self.chunk_rows
        stop = min(start + count * self.chunk_rows, self.rows)
        file_rows = self.chunk_rows * self.file_chunks
        parts = [
            self._slice(file, max(start - file * file_rows, 0), min(stop - file * file_rows, file_rows))
            for file in range(start // file_rows, -(-stop // file_rows))
        ]
        return np.concatenate(parts)

    def _slice(self, file: int, start: int, stop: int) -> NDArray[np.float32]:
        path, width = self._path(file), self.classes * _DTYPE.itemsize
        content: bytes = path.fs.cat_file(path.path, start * width, stop * width)
        return np.frombuffer(content, _DTYPE).astype(np.float32).reshape(stop - start, self.classes)

    def _path(self, file: int) -> UPath:
        return self.folder / f"{file:06d}.f32"
