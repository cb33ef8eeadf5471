"""What stands between the stored chunks and the lanes: chunks put together, read back whole."""

import math
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.feed import Feed
from pipelines.prepared import Prepared, SplitFile, SplitIndex
from pipelines.training.lanes import feed_over, text_batches
from tests.making import make_prepared, open_store


@given(
    rows=st.integers(1, 20_000),
    chunk_rows=st.integers(16, 3000),
    lanes=st.integers(1, 8),
    microbatch=st.integers(1, 64),
)
@settings(max_examples=150, deadline=None)
def test_chunks_put_together_never_add_steps(rows: int, chunk_rows: int, lanes: int, microbatch: int) -> None:
    files = (SplitFile(name="part", chunks=math.ceil(rows / chunk_rows)),)
    feed = feed_over(SplitIndex(rows=rows, chunk_rows=chunk_rows, files=files), lanes, microbatch, 0)
    assert feed.steps <= Feed(rows, chunk_rows, lanes, microbatch, 0).steps
    assert feed.chunk_rows % chunk_rows == 0
    assert feed.chunk_rows <= max(4096, chunk_rows)


def test_an_epoch_reads_each_row_once_in_batches_of_like_lengths(tmp_path: Path) -> None:
    prepared = Prepared(make_prepared(open_store(tmp_path), rows=400, chunk_rows=16).path)
    split = prepared.index.splits["train"]
    feed = feed_over(split, 4, 8, 3)
    assert feed.chunk_rows > split.chunk_rows
    stored = prepared.read_split("train")
    lengths = dict(zip(stored["row"].to_pylist(), stored["length"].to_pylist(), strict=True))
    seen: list[int] = []
    tokens = padded = 0
    readers = [text_batches(prepared, feed, [lane]) for lane in range(4)]
    for step in range(feed.steps):
        for lane, reader in enumerate(readers):
            batch = reader(1, step, lane)
            if batch is None:
                continue
            seen += batch.rows
            tokens += int(batch.inputs["attention_mask"].sum())
            padded += batch.inputs["attention_mask"].numel()
            assert [lengths[row] for row in batch.rows] == batch.inputs["attention_mask"].sum(1).tolist()
    assert sorted(seen) == sorted(lengths)
    assert tokens == sum(lengths.values())
    assert tokens / padded > 0.9
    assert np.unique(seen).size == len(seen)
