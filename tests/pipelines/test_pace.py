"""The time between checkpoints follows from what they cost and how often there are failures."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.training.pace import PRIOR_SECONDS, Pace


def test_the_first_comes_soon_to_learn_what_one_costs() -> None:
    assert Pace(10, 600).interval == 10


def test_it_is_what_young_and_daly_found() -> None:
    assert Pace(1, 1e6, cost=2.0).interval == pytest.approx(math.sqrt(2 * 2.0 * PRIOR_SECONDS) - 2.0)
    # Four failures in two hours: one in 36 minutes, with the one that was supposed.
    assert Pace(1, 1e6, 4, 7200, cost=0.5).interval == pytest.approx(math.sqrt(2 * 0.5 * 2160) - 0.5)


@given(st.floats(0.001, 1000), st.integers(0, 1000), st.floats(0, 1e6))
def test_it_stays_within_the_bounds_and_costs_little(cost: float, failures: int, seconds: float) -> None:
    interval = Pace(10, 600, failures, seconds, cost).interval
    assert 10 <= interval <= 600
    assert interval == 600 or cost / interval <= 0.02 + 1e-9


def test_more_failures_make_it_shorter() -> None:
    intervals = [Pace(1, 1e6, failures, 3600, 1.0).interval for failures in (0, 1, 10, 100)]
    assert intervals == sorted(intervals, reverse=True)
