"""The rows that cannot be used, of all passes, with their places and the reasons."""

from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from pipelines.preparing.exchange import read_rows
from pipelines.preparing.sieve import REJECTED
from pipelines.preparing.units import Unit, first_lines


def write_rejected(
    work: UPath, folder: UPath, units: list[Unit], cleaned: list[dict[str, Any]], gathered: list[dict[str, Any]]
) -> int:
    """Joins what the passes rejected into one Parquet file, piece by piece; returns how many rows that is."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = first_lines(units, cleaned)
    path = folder / "part-00000.parquet"
    count = 0
    with path.fs.open(path.path, "wb") as stream, pq.ParquetWriter(stream, REJECTED, compression="zstd") as writer:
        for number, result in enumerate(cleaned):
            if result["rejected"]:
                table = read_rows(work / "clean" / f"{number:06d}.rejected", 0, result["rejected"])
                table = table.set_column(1, "row", pc.add(table["row"], lines[number]))
                writer.write_table(table)
                count += len(table)
        for partition, result in enumerate(gathered):
            if result["rejected"]:
                table = read_rows(work / "gather" / f"{partition:06d}.rejected", 0, result["rejected"])
                writer.write_table(table)
                count += len(table)
    return count
