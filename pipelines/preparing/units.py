"""Cutting sources into units: pieces that one task reads, cleans and writes.

The cuts depend on the data alone, never on the cluster, so that a rerun anywhere makes the same units. Text
formats are cut at record ends. In csv and tsv a newline may stand inside quotes, and whether it does depends on
every quote before it; one pass over the file finds out exactly (about 1 GB/s, of a malformed file 0.1),
little beside tokenising at 6 MB/s and core. It holds two blocks in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.settings import InputError
from pipelines.preparing.formats import Source, delimiter_of

_SMALLEST, _LARGEST, _WANTED = 2**20, 2**25, 64
_LONGEST_RECORD = 2**26
_ROW_BYTES = 512
QUOTE, NEWLINE = b'"', b"\n"


@dataclass(frozen=True)
class Unit:
    """A part of a source: bytes `start` to `stop` of a text format, else rows."""

    source: Source
    start: int
    stop: int


def unit_bytes(sources: list[Source]) -> int:
    """How large units are: 64 of them, but each between 1 and 32 MiB."""
    return min(max(sum(source.size for source in sources) // _WANTED, _SMALLEST), _LARGEST)


def first_lines(units: list[Unit], cleaned: list[dict[str, Any]]) -> list[int]:
    """The line of its file at which each unit begins, from 0; units of tables count lines in the file already."""
    lines: list[int] = []
    seen: dict[int, int] = {}
    for unit, result in zip(units, cleaned, strict=True):
        key = id(unit.source)  # A file may be read as several sources.
        lines.append(seen.get(key, unit.source.header_lines))
        seen[key] = lines[-1] + result["lines"]
    return lines


def cut(source: Source, target: int, quotes: bool) -> list[tuple[int, int]]:
    """The units of one source, each of about `target` bytes.

    Raises:
        InputError: a quote in a csv or tsv file is never closed, or a record is longer than 64 MiB.
    """
    match source.format:
        case "parquet" | "datasets":
            row_bytes = max(source.size / max(source.rows, 1), _ROW_BYTES / 8)
            return list(_ranges(source.rows, max(int(target / row_bytes), 1)))
        case "pickle":
            return [(0, source.rows)]
    with source.open() as stream:
        stream.seek(source.header_bytes)
        if source.format in ("csv", "tsv") and quotes:
            ends = list(_record_ends(source, stream, target))
        else:
            ends = list(_line_ends(source, stream, target))
    starts = [source.header_bytes, *ends[:-1]]
    return [(start, stop) for start, stop in zip(starts, ends, strict=True) if stop > start]


def _ranges(total: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, step):
        yield start, min(start + step, total)


def _line_ends(source: Source, stream: Any, target: int) -> Iterator[int]:
    """Where units end when every newline ends a record: only the surroundings of the cuts are read."""
    position = source.header_bytes
    while position + target < source.size:
        position += target
        stream.seek(position)
        searched = 0
        while block := stream.read(2**16):
            newline = block.find(NEWLINE)
            if newline >= 0:
                position += searched + newline + 1
                break
            searched += len(block)
            if searched > _LONGEST_RECORD:
                raise InputError(
                    f"{source.path} has a line longer than {_LONGEST_RECORD:,} bytes near byte {position}."
                )
        else:
            break
        if position < source.size:
            yield position
    yield source.size


def _record_ends(source: Source, stream: Any, target: int) -> Iterator[int]:
    """Where units end when newlines inside quotes end no record."""
    openers = frozenset(delimiter_of(source.format).encode() + b"\n\r")
    position = source.header_bytes
    carried = b""
    while True:
        read = stream.read(target)
        block = carried + read
        last = position + len(block) >= source.size or not read
        end, open_at = last_record_end(block, openers)
        if last:
            if open_at is not None:
                raise InputError(
                    f"{source.path}: the quote that opens at byte {position + open_at:,} is never closed; if quotes "
                    "are plain characters there, set data.quotes=false."
                )
            yield source.size
            return
        if end == 0 and len(block) > _LONGEST_RECORD:
            raise InputError(
                f"{source.path}: the record at byte {position:,} is longer than {_LONGEST_RECORD:,} bytes; if quotes "
                "are plain characters there, set data.quotes=false."
            )
        if end:
            yield position + end
        carried = block[end:]
        position += end


def last_record_end(block: bytes, openers: frozenset[int]) -> tuple[int, int | None]:
    """The end of the last whole record in a block that starts at a record's beginning, and an open quote, if any.

    Follows Python's csv: a quote opens only at the beginning of a field, `""` inside quotes stands for one.
    """
    toggles = _quote_toggles(block, openers)
    newline = block.rfind(NEWLINE)
    while newline >= 0 and (before := int(np.searchsorted(toggles, newline))) % 2:
        newline = block.rfind(NEWLINE, 0, toggles[before - 1])
    return newline + 1, int(toggles[-1]) if len(toggles) % 2 else None


def _quote_toggles(block: bytes, openers: frozenset[int]) -> NDArray[np.int64]:
    """Where quoting begins (even positions of the answer) and ends (odd ones)."""
    content = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(content == QUOTE[0])
    opening = quotes[0::2]
    opens_field = (opening == 0) | np.isin(content[opening - 1], list(openers))
    escaped = np.zeros(len(opening), bool)
    escaped[1:] = quotes[1:-1:2][: len(opening) - 1] == opening[1:] - 1
    if np.all(opens_field | escaped):
        return quotes  # well formed: quotes alternate, and the two halves of an escaped one cancel out
    toggles: list[int] = []
    remaining = iter(zip(quotes.tolist(), [*quotes[1:].tolist(), -1], strict=True))
    for position, following in remaining:
        if len(toggles) % 2 == 0:
            if position == 0 or block[position - 1] in openers:
                toggles.append(position)
        elif following == position + 1:
            next(remaining)
        else:
            toggles.append(position)
    return np.array(toggles, np.int64)
