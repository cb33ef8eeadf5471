"""The number of replicas follows the tokens: what comes, what waits, what was sent away."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.scaling import TokenPolicy, replicas_for

TARGETS = {"target_wait_s": 0.5, "target_busy": 0.5}
AMOUNTS = st.floats(0, 1e6)


def wanted(replicas: list[dict[str, float]], target: int = 1, waiting: float = 0) -> float:
    names = replicas[0] if replicas else {}
    told = {name: {number: each[name] for number, each in enumerate(replicas)} for name in names}
    context: Any = SimpleNamespace(aggregated_metrics=told, target_num_replicas=target, total_queued_requests=waiting)
    number, state = TokenPolicy(**TARGETS)(context)
    assert state == {}
    return number


def told(**given: float) -> dict[str, float]:
    return {
        "queued_tokens": 0.0,
        "tokens_per_second": 1000.0,
        "busy": 0.0,
        "refused_per_second": 0.0,
        "requests": 0,
        **given,
    }


def test_replicas_keep_up_with_what_comes_and_clear_what_waits() -> None:
    assert wanted([told(busy=0.5)]) == pytest.approx(1)
    assert wanted([told(busy=1.0)]) == pytest.approx(2)
    assert wanted([told(busy=1.0), told(busy=0.5)]) == pytest.approx(3)
    assert wanted([told(busy=1.0, queued_tokens=1000.0)]) == pytest.approx(2 + 4), "half a second to clear a second's"
    assert wanted([told(busy=1.0, refused_per_second=3000.0)]) == pytest.approx(8)
    assert wanted([told()]) == 0


def test_while_nothing_was_computed_nothing_changes() -> None:
    assert wanted([], target=3) == 3
    assert wanted([told(tokens_per_second=0.0, requests=1)], target=2) == 2
    assert wanted([told(tokens_per_second=0.0)], target=2, waiting=0.5) == 2


def test_it_comes_to_rest_only_without_requests() -> None:
    assert wanted([told(tokens_per_second=0.0)]) == 0, "woken by a request that computed nothing"
    assert wanted([told(), told()], target=2) == 0
    assert wanted([told(requests=0.1)]) == 1, "one that computes no tokens, such as an explanation"
    assert wanted([told()], waiting=0.1) == 1, "one that has not reached the replica"
    assert wanted([told(busy=1.0, requests=5.0)]) == pytest.approx(2)


@given(queued=AMOUNTS, more=AMOUNTS, per_second=AMOUNTS, speed=st.floats(1, 1e6))
def test_more_to_do_never_takes_replicas_away(queued: float, more: float, per_second: float, speed: float) -> None:
    before = replicas_for(queued, per_second, speed, **TARGETS)
    assert replicas_for(queued + more, per_second, speed, **TARGETS) >= before
    assert replicas_for(queued, per_second + more, speed, **TARGETS) >= before
    assert replicas_for(queued, per_second, speed * 2, **TARGETS) == pytest.approx(before / 2)
