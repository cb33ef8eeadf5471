"""The gates of a rollout: what is enough, what is too little, and what is judged early."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.gates import Plan, Replayed, compare_evaluations, compare_replays, interval, judge
from serve.traffic import BOUNDS_MS, Counts, Tally

PLAN = Plan(min_requests=100, min_s=10)


def counts(requests: int, *, errors: int = 0, ms: float = 10) -> Counts:
    found = Counts()
    for number in range(requests):
        found.add(ms / 1000, failed=number < errors)
    return found


def test_a_good_candidate_passes_when_it_has_been_seen_enough() -> None:
    good = Tally(stable=counts(900), candidate=counts(100))
    assert judge(PLAN, "10%", good, 10)[0] == "pass"
    assert judge(PLAN, "10%", good, 9)[0] == "wait"
    assert judge(PLAN, "10%", Tally(stable=counts(900), candidate=counts(99)), 60)[0] == "wait"
    assert judge(PLAN, "10%", Tally(), 1e6)[0] == "wait"


def test_errors_and_slowness_shut_the_gate() -> None:
    assert judge(PLAN, "10%", Tally(stable=counts(900), candidate=counts(100, errors=2)), 10)[0] == "fail"
    slow = Tally(stable=counts(900), candidate=counts(100, ms=60))
    verdict, checks = judge(PLAN, "10%", slow, 10)
    assert verdict == "fail"
    assert [check.name for check in checks if not check.passed] == ["p95 in ms"]
    # With nothing to compare with, time says nothing.
    assert judge(PLAN, "100%", Tally(candidate=counts(100, ms=60)), 10)[0] == "pass"


def test_what_is_sure_is_judged_early() -> None:
    assert judge(PLAN, "10%", Tally(candidate=counts(8, errors=8)), 0.1)[0] == "fail"
    assert judge(PLAN, "10%", Tally(candidate=counts(8, errors=2)), 0.1)[0] == "wait"
    other = Tally(candidate=counts(60), compared=60, agreed=30)
    assert judge(PLAN, "shadow", other, 0.1)[0] == "fail"
    assert judge(PLAN, "shadow", Tally(candidate=counts(60), compared=60, agreed=48), 0.1)[0] == "wait"
    assert judge(PLAN, "shadow", Tally(candidate=counts(30), compared=30, agreed=0), 0.1)[0] == "wait"


def test_a_good_candidate_is_seldom_judged_early() -> None:
    draw, failed = random.Random(1), 0
    for _ in range(200):
        errors = 0
        for requests in range(1, 200):
            errors += draw.random() < 0.005
            tally = Tally(candidate=Counts(requests=requests, errors=errors))
            failed += judge(Plan(), "10%", tally, 0.1)[0] == "fail"
    assert failed == 0


def test_a_shadow_must_agree() -> None:
    for agreed, verdict in ((270, "pass"), (269, "fail")):
        tally = Tally(stable=counts(100), candidate=counts(100), compared=300, agreed=agreed)
        assert judge(PLAN, "shadow", tally, 10)[0] == verdict
    assert judge(PLAN, "shadow", Tally(candidate=counts(100)), 10)[0] == "wait", "nothing was compared"


@given(st.integers(0, 500), st.integers(0, 500))
def test_an_interval_holds_its_share_and_narrows(count: int, more: int) -> None:
    of = count + more
    low, high = interval(count, of)
    assert 0 <= low <= high <= 1
    if of:
        assert low - 1e-9 <= count / of <= high + 1e-9
        wider = interval(count * 4, of * 4)
        assert wider[1] - wider[0] <= high - low


@given(st.lists(st.floats(0.001, 1e5), min_size=1, max_size=50), st.floats(0.01, 1))
def test_quantiles_are_right_to_a_twentieth(milliseconds: list[float], share: float) -> None:
    found = Counts()
    for each in milliseconds:
        found.add(each / 1000)
    exact = float(np.quantile(milliseconds, share, method="inverted_cdf"))
    assert exact <= found.quantile_ms(share) * (1 + 1e-9)
    assert found.quantile_ms(share) <= max(exact * 1.05 * (1 + 1e-9), BOUNDS_MS[0])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=4))
def test_tallies_add_up(replicas: list[tuple[int, int]]) -> None:
    tallies = [Tally(stable=counts(n), candidate=counts(n, errors=e), compared=n, agreed=e) for e, n in replicas]
    total = sum(tallies, Tally())
    assert total.stable.requests == total.compared == sum(n for _, n in replicas)
    assert total.candidate.errors == sum(min(e, n) for e, n in replicas)
    assert sum(total.stable.milliseconds) == total.stable.answered


def test_evaluations_and_replays_are_compared() -> None:
    before = {"a.macro_f1": 0.8, "a.accuracy": 0.9, "engine": "onnx int8"}
    assert [each.passed for each in compare_evaluations(PLAN, before, {"a.macro_f1": 0.795, "engine": "x"})] == [True]
    assert [each.passed for each in compare_evaluations(PLAN, before, {"a.macro_f1": 0.78})] == [False]
    old = [Replayed(column="a", rows=9, macro_f1=0.8, calibration_error=0.02)]
    for macro_f1, error, passed in ((0.8, 0.03, [True, True]), (0.7, 0.03, [False, True]), (0.9, 0.05, [True, False])):
        new = [Replayed(column="a", rows=9, macro_f1=macro_f1, calibration_error=error)]
        assert [each.passed for each in compare_replays(PLAN, old, new)] == passed


@pytest.mark.parametrize("shares", [(0.5, 0.1), (0.0, 0.5), (0.5, 1.5), (0.5, 0.5)])
def test_shares_must_grow(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="shares must grow"):
        Plan(shares=shares)
