"""The ledger: which rows each lane of each step consumed, as a digest; what an audit compares with the plan.

A digest is 52 bits of BLAKE2b over the rows' identities in their order, so that it fits a float64 exactly and can be
gathered with the lanes' losses. Two different microbatches share one with a probability of 2e-16. A dry lane has zero.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BITS = 52


def digest(rows: Sequence[int]) -> int:
    """The digest of a microbatch; never zero, unless there are no rows."""
    if not rows:
        return 0
    content = np.asarray(rows, dtype="<i8").tobytes()
    return max(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> (64 - _BITS), 1)


class Ledger:
    """Digests of all steps so far, [steps, lanes], whether a step took an optimizer step or not."""

    def __init__(self, lanes: int, entries: NDArray[np.int64] | None = None) -> None:
        self._entries = np.zeros((1024, lanes), dtype=np.int64) if entries is None else np.array(entries)
        self._steps = 0 if entries is None else len(entries)

    def append(self, digests: Sequence[int]) -> None:
        """Adds a step."""
        if self._steps == len(self._entries):
            more = np.zeros((max(len(self._entries), 1024), self._entries.shape[1]), dtype=np.int64)
            self._entries = np.concatenate([self._entries, more])
        self._entries[self._steps] = digests
        self._steps += 1

    @property
    def entries(self) -> NDArray[np.int64]:
        """[steps, lanes]."""
        return self._entries[: self._steps]
