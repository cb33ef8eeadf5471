"""A prepared dataset can be read by several threads at once, as training does that reads ahead."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from pipelines.prepared import INDEX, Index, Prepared, SplitFile, SplitIndex
from tests.pipelines.tiny import TOPIC

FILES, CHUNKS, ROWS = 12, 6, 50


def test_threads_read_the_same_dataset_at_once(tmp_path: Path) -> None:
    for file in range(FILES):
        rows = np.arange(file * CHUNKS * ROWS, (file + 1) * CHUNKS * ROWS)
        pq.write_table(pa.table({"row": rows}), tmp_path / f"{file}.parquet", row_group_size=ROWS)
    files = tuple(SplitFile(name=f"{file}.parquet", chunks=CHUNKS) for file in range(FILES))
    split = SplitIndex(rows=FILES * CHUNKS * ROWS, chunk_rows=ROWS, files=files)
    (tmp_path / INDEX).write_text(Index(labels=(TOPIC,), max_length=8, splits={"train": split}).model_dump_json())
    prepared = Prepared(UPath(tmp_path))
    # More files than it keeps open, in an order that changes them at nearly each chunk.
    wanted = np.random.default_rng(0).integers(0, split.chunks, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda chunk: prepared.read_chunk("train", chunk)["row"][0].as_py(), wanted)
        assert list(found) == [chunk * ROWS for chunk in wanted]
