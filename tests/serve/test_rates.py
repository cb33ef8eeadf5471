"""The token bucket: nobody gets more than the rate and the burst allow, and nobody is refused what they allow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import rates
from serve.problems import ProblemError
from serve.rates import TokenBuckets


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


@given(
    rate=st.floats(0.01, 1000),
    burst=st.integers(1, 5),
    # In the time in which one request is filled in; most come at once.
    pauses=st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0, 3.7, 100.0]), min_size=1, max_size=60),
)
def test_the_bucket_gives_what_was_filled_in_and_no_more(rate: float, burst: int, pauses: list[float]) -> None:
    """Held against a bucket that is counted out."""
    clock = Clock()
    buckets = TokenBuckets(clock)
    held = float(burst)
    for pause in pauses:
        clock.now += pause / rate
        held = min(burst, held + pause)
        wait = buckets.take("client", rate, burst)
        if wait:
            assert held < 1 + 1e-5
            assert wait == pytest.approx((1 - held) / rate, rel=1e-4, abs=1e-5)
            before = clock.now
            clock.now = before + wait * (1 - 1e-3) - 1e-6
            assert buckets.take("client", rate, burst), "it is not to be had sooner than was told"
            clock.now = before + wait + 1e-6
            assert not buckets.take("client", rate, burst), "it is to be had when it was told"
            held += (clock.now - before) * rate - 1
        else:
            assert held > 1 - 1e-5
            held -= 1


def test_each_client_has_its_own_bucket() -> None:
    buckets = TokenBuckets(Clock())
    assert [buckets.take(client, 1, 1) > 0 for client in ("a", "b", "a", "b")] == [False, False, True, True]


def test_a_refusal_says_when_to_come_again() -> None:
    clock = Clock()
    buckets = TokenBuckets(clock)
    buckets.limit("a", 0.25)
    with pytest.raises(ProblemError, match=r"more than 0\.25 requests a second; try again in 4 s") as refused:
        buckets.limit("a", 0.25)
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "4")
    clock.now += 4
    buckets.limit("a", 0.25)
    for _ in range(7):
        buckets.limit("b", 7)
    with pytest.raises(ProblemError):
        buckets.limit("b", 7)


def test_clients_that_went_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_ENTRIES", 10)
    clock = Clock()
    buckets = TokenBuckets(clock)
    for number in range(1000):
        clock.now += 0.5
        buckets.take(f"client {number}", 1, 1)
        assert len(buckets._full_at) <= 21
    assert buckets.take("client 999", 1, 1) > 0
