"""The ledger: digests tell microbatches apart, and any number of steps is kept."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.ledger import Ledger, digest

ROWS = st.lists(st.integers(0, 2**62), min_size=1, max_size=40, unique=True)


@given(ROWS, st.randoms(use_true_random=False))
def test_a_digest_tells_rows_and_their_order_apart(rows: list[int], random: "np.random.Generator") -> None:
    other = list(rows)
    random.shuffle(other)  # type: ignore[arg-type]
    assert (digest(other) == digest(rows)) == (other == rows)
    assert digest(rows[:-1]) != digest(rows)
    assert digest([*rows[:-1], rows[-1] + 1]) != digest(rows)


@given(ROWS)
def test_a_digest_goes_through_a_float64(rows: list[int]) -> None:
    assert int(torch.tensor(digest(rows), dtype=torch.float64)) == digest(rows) > 0
    assert digest([]) == 0


def test_steps_are_kept_in_order() -> None:
    ledger = Ledger(3)
    wanted = np.arange(9_000).reshape(3_000, 3)
    for step in wanted[:1500]:
        ledger.append(step.tolist())
    ledger = Ledger(3, ledger.entries)
    for step in wanted[1500:]:
        ledger.append(step.tolist())
    assert np.array_equal(ledger.entries, wanted)
