"""A prepared dataset: the contract between `prepare`, which writes it, and the stages that read it.

    prepared.json             this module's `Index`
    train/part-00000.parquet  rows in their final (shuffled) order; one Parquet row group is one chunk
    validation/ test/         the same form
    tokenizer/                as `AutoTokenizer.from_pretrained` loads it
    rejected/part-00000.parquet   what could not be used: file, row, step, reason, text

Columns of a row:

    row         int64         the row's identity: its position in the sources, counted from 0 over all files
    text        string        after repair and normalisation;  text_pair likewise, for pairs
    input_ids   list<int32>   with special tokens, cut to max_length;  token_type_ids list<int8> for pairs
    length      int32         len(input_ids)
    truncated   bool          whether text was lost to max_length
    label:NAME  int32         index into the column's classes, -1 where it is missing;
                list<int32>   the indices that hold, for a multi-label column
    column:NAME string        further columns that the recipe keeps (for slices)
"""

import threading
from collections import OrderedDict
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from models.labels import LabelColumn
from models.settings import Settings
from models.text import TextSettings

INDEX = "prepared.json"
SPLITS = ("train", "validation", "test")


class SplitFile(Settings):
    """One Parquet file of a split and how many chunks (row groups) it holds."""

    name: str
    """Relative to the dataset's folder."""
    chunks: int


class SplitIndex(Settings):
    """A split: `rows` in chunks of `chunk_rows`, the last of which may be shorter."""

    rows: int
    chunk_rows: int
    files: tuple[SplitFile, ...]
    tokens: int = 0
    truncated: int = 0
    documents: int = 0
    """Of packed rows."""
    bytes: int = 0
    """Of the documents' text, in UTF-8."""

    @property
    def chunks(self) -> int:
        """Chunks of all files."""
        return sum(file.chunks for file in self.files)


class Index(Settings):
    """What a prepared dataset holds. Small however many rows there are."""

    labels: tuple[LabelColumn, ...]
    pair: bool = False
    max_length: int
    splits: dict[str, SplitIndex]
    text: TextSettings = TextSettings()
    """How the texts were cleaned."""
    columns: tuple[str, ...] = ()
    """Further columns kept, by their names in the source."""


class Prepared:
    """Reads a prepared dataset, a chunk or a split at a time.

    Keeps the footers of the last few Parquet files it read; holds no state per row. Several threads may read at once.
    """

    def __init__(self, folder: UPath) -> None:
        self.folder = folder
        self._open_files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        # An open Parquet file has one position, and the files open change as they are read.
        self._lock = threading.Lock()

    @cached_property
    def index(self) -> Index:
        """The dataset's index, read once."""
        return Index.model_validate_json((self.folder / INDEX).read_text(encoding="utf-8"))

    @property
    def tokenizer_folder(self) -> UPath:
        """Where the tokenizer stands."""
        return self.folder / "tokenizer"

    def read_chunk(self, split: str, chunk: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of one chunk, in stored order."""
        group = chunk
        for file in self.index.splits[split].files:
            if group < file.chunks:
                with self._lock:
                    return self._file(file.name).read_row_group(group, columns=columns, use_threads=False)
            group -= file.chunks
        raise IndexError(f"{split} has no chunk {chunk}")

    def read_split(self, split: str, columns: list[str] | None = None) -> pa.Table:
        """All rows of a split, in stored order: for the small ones (validation, test) and reports."""
        with self._lock:
            return pa.concat_tables(
                [self._file(file.name).read(columns=columns) for file in self.index.splits[split].files]
            )

    def _file(self, name: str) -> pq.ParquetFile:
        if name in self._open_files:
            self._open_files.move_to_end(name)
        else:
            path = self.folder / name
            self._open_files[name] = pq.ParquetFile(path.fs.open(path.path, "rb"))
            if len(self._open_files) > 8:
                self._open_files.popitem(last=False)
        return self._open_files[name]
