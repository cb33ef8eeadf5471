"""A run's ledger as a file that any reader of Parquet opens: a row for each lane of each step."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

LEDGER = "ledger.parquet"


def write_ledger(out: UPath, entries: NDArray[np.int64], epoch_steps: int) -> None:
    """Writes the digests, [steps, lanes], with the epoch, the step in it and the lane of each."""
    steps, lanes = entries.shape
    step, lane = np.divmod(np.arange(steps * lanes), lanes)
    columns = {"epoch": step // epoch_steps, "step": step % epoch_steps, "lane": lane, "digest": entries.reshape(-1)}
    table = pa.table({name: pa.array(values, pa.int64()) for name, values in columns.items()})
    with (out / LEDGER).open("wb") as file:
        pq.write_table(table, file)


def read_ledger(out: UPath) -> NDArray[np.int64]:
    """The digests, [steps, lanes]."""
    with (out / LEDGER).open("rb") as file:
        table = pq.read_table(file, columns=["lane", "digest"])
    lanes = int(table["lane"].to_numpy().max(initial=0)) + 1
    entries: NDArray[np.int64] = table["digest"].to_numpy().reshape(-1, lanes)
    return entries
