"""The rows of one unit on their way through the steps of `prepare`: what is kept, and what was dropped and why."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from models.redaction import Redactor
from models.text import redact

STEPS = ("decode", "where", "repair", "normalise", "redact", "length", "labels", "split", "duplicates")
"""What may drop or change a row, in the order in which a row meets it."""

REJECTED = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("step", pa.string()), ("reason", pa.string()), ("text", pa.string())]
)
"""Of a rejected row: `row` is the line (of text formats) or the row of the file, counted from 1."""

_KEPT_TEXT = 2000


class Sieve:
    """A table of rows; steps drop some of them with a reason, and each is counted.

    `table` has the columns `position` (of the row in its unit), `line` (in its file, counted from 0 at the
    unit's beginning) and `text`, and whatever else the rows have.
    """

    def __init__(self, table: pa.Table, file: str) -> None:
        self.table = table
        self.file = file
        self.dropped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.redacted: Counter[str] = Counter()
        """How much personal data of each kind was masked."""
        self.redactor: Redactor | None = None
        """What masks it in rejected rows, whichever step they come to."""
        self._rejected: list[pa.Table] = []

    def drop(self, step: str, bad: NDArray[np.bool_], reasons: Any) -> None:
        """Drops the rows where `bad`; `reasons` is one for all, or a list with one for each dropped row."""
        if not bad.any():
            return
        lost = self.table.filter(pa.array(bad))
        self.reject(step, lost["line"], reasons, lost["text"])
        self.table = self.table.filter(pa.array(~bad))

    def reject(self, step: str, lines: Any, reasons: Any, texts: Any) -> None:
        """Records rows that never were in the table, or are in it no longer."""
        count = len(lines)
        self.dropped[step] += count
        values = [reasons] * count if isinstance(reasons, str) else reasons
        texts = texts if isinstance(texts, pa.Array | pa.ChunkedArray) else pa.array(texts, pa.string())
        columns = {
            "file": pa.array([self.file] * count, pa.string()),
            "row": pc.add(lines, 1) if isinstance(lines, pa.Array | pa.ChunkedArray) else pa.array(lines, pa.int64()),
            "step": pa.array([step] * count, pa.string()),
            "reason": pa.array(values, pa.string()),
            "text": texts,
        }
        self._rejected.append(pa.table(columns, schema=REJECTED))

    def replace(self, step: str, column: str, values: Any) -> None:
        """Gives a column new values and counts the rows that this changed."""
        before = self.table[column]
        differs = pc.sum(pc.not_equal(before, values)).as_py() or 0
        if differs:
            self.changed[step] += int(differs)
            self.table = self.table.set_column(self.table.schema.get_field_index(column), column, values)

    @property
    def rejected(self) -> pa.Table:
        """All rejected rows, by step and row, with the beginnings of their texts."""
        table = pa.concat_tables(self._rejected) if self._rejected else REJECTED.empty_table()
        columns = {name: whole(table[name]) for name in table.column_names}
        if self.redactor:
            # Before texts are cut: half a number would not be known for one. Reasons quote cells.
            columns |= {name: redact(columns[name], self.redactor)[0] for name in ("reason", "text")}
        columns["text"] = pc.utf8_slice_codeunits(columns["text"], 0, _KEPT_TEXT)
        return pa.table(columns, schema=REJECTED)


def mask(values: Any) -> NDArray[np.bool_]:
    """An Arrow boolean column as a numpy mask; null is False."""
    filled = pc.fill_null(values, False)
    filled = whole(filled)
    return np.asarray(filled.to_numpy(zero_copy_only=False), dtype=bool)


def whole(column: Any) -> Any:
    """A column as one array."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
