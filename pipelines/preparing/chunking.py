"""What both kinds of prepared datasets, of labelled texts and of packed rows, are made with."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from models.redaction import KINDS, NAME
from pipelines.preparing.formats import Source
from pipelines.preparing.sieve import STEPS

# A multiple of 24 chunks deals out evenly to 1, 2, 3, 4, 6 or 8 lanes; large ones let texts of like length meet.
_CHUNKS_MULTIPLE = 24
_SMALLEST_CHUNK, _LARGEST_CHUNK = 32, 4096
_PARTITION_BYTES = 2**26


def partitions_for(sources: Iterable[Source]) -> int:
    """Into how many key ranges the rows of some sources are dealt."""
    return max(1, math.ceil(sum(source.size for source in sources) / _PARTITION_BYTES))


def chunk_rows_for(rows: int) -> int:
    """Rows in a chunk of a training set of `rows`."""
    parts = math.ceil(rows / (_CHUNKS_MULTIPLE * _LARGEST_CHUNK))
    return max(math.ceil(rows / (_CHUNKS_MULTIPLE * parts)), _SMALLEST_CHUNK)


def masked_counts(cleaned: list[dict[str, Any]]) -> dict[str, int]:
    """How much personal data of each kind was masked, as metrics."""
    masked: Counter[str] = Counter()
    for result in cleaned:
        masked.update(result.get("redacted", {}))
    return {f"masked_{kind}": masked[kind] for kind in (*KINDS, NAME) if masked[kind]}


def step_counts(results: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """What each step dropped and changed."""
    dropped: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for result in results:
        dropped.update(result["dropped"])
        changed.update(result.get("changed", {}))
    return {step: {"dropped": dropped[step], "changed": changed[step]} for step in STEPS}
