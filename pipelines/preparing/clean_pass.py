"""The first pass of `prepare`: each unit of the data is read, cleaned and dealt to partitions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from upath import UPath

from pipelines.preparing.cleaning import CleaningSettings, clean
from pipelines.preparing.data import DataSettings
from pipelines.preparing.decoding import decode
from pipelines.preparing.exchange import write_rows, write_spill
from pipelines.preparing.sieve import whole
from pipelines.preparing.splitting import SplittingSettings, digests, mix, partition_of
from pipelines.preparing.units import Unit


@dataclass(frozen=True)
class CleanPass:
    """A unit becomes `clean/NUMBER.spill`, its usable rows by partition, and `clean/NUMBER.rejected`."""

    data: DataSettings
    cleaning: CleaningSettings
    splitting: SplittingSettings
    partitions: int
    work: str

    def __call__(self, number: int, unit: Unit) -> dict[str, Any]:
        decoded = decode(unit, self.data)
        sieve = decoded.sieve
        sieve.redactor = self.cleaning.redact.redactor if self.cleaning.redact else None
        clean(sieve, self.data, self.cleaning, unit.source.split)
        table = sieve.table.combine_chunks()
        text = whole(table["text"])
        pair = whole(table["text_pair"]) if self.data.text_pair else None
        high, low = digests(text, pair)
        unique = np.zeros(len(high), np.uint64)
        if self.splitting.deduplicate == "none":
            places = (np.uint64(number) << np.uint64(32)) + table["position"].to_numpy().astype(np.uint64)
            unique = mix(places, 1)
        keys = mix(low ^ unique, self.splitting.seed)
        table = (
            table.append_column("key", pa.array(keys))
            .append_column("high", pa.array(high))
            .append_column("low", pa.array(low))
        )
        folder = UPath(self.work) / "clean"
        offsets = write_spill(
            table, partition_of(keys, self.partitions), self.partitions, folder / f"{number:06d}.spill"
        )
        rejected = sieve.rejected
        if len(rejected):
            write_rows(folder / f"{number:06d}.rejected", rejected)
        return {
            "rows": decoded.rows,
            "lines": decoded.lines,
            "offsets": offsets,
            "given": sorted({int(code) for code in np.unique(table["given"].to_numpy()) if code >= 0}),
            "dropped": dict(sieve.dropped),
            "changed": dict(sieve.changed),
            "redacted": dict(sieve.redacted),
            "rejected": len(rejected),
        }
