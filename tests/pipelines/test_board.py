"""Who goes on in a sweep: only the best share of each rung, and always somebody."""

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sweeping.board import Board, Entry, StopName
from pipelines.sweeping.proposing import propose
from pipelines.sweeping.space import Distribution


def rung(number: int, score: float, loss: float = 0.0, *, whole: bool = False) -> dict[str, Any]:
    return {"rung": number, "score": score, "loss": loss, "whole": whole}


def play(
    stop: StopName, wanted: int, rungs: int, slots: int, seed: int, reduction: float = 3.0, failures: float = 0.0
) -> Board:
    """A whole sweep with random scores, so many at a time, which end in any order."""
    draw = random.Random(seed)
    board = Board(stop, reduction, rungs, wanted)
    while True:
        while sum(entry.running for entry in board.entries) < slots:
            entry = board.next()
            if entry is None and len(board.entries) < wanted:
                entry = Entry({"x": len(board.entries)})
                board.entries.append(entry)
            entry = entry or (board.last() if len(board.entries) >= wanted else None)
            if entry is None:
                break
            assert not entry.running
            assert not entry.whole
            assert not entry.stopped, "what was stopped does not go on"
            assert not entry.failed
            assert not entry.lost
            entry.running = True
        running = [entry for entry in board.entries if entry.running]
        if not running:
            return board
        ended = draw.choice(running)
        ended.running = False
        number = ended.rung + 1
        if failing := draw.random() < failures:
            if draw.random() < 0.5:
                ended.lost = "its node is gone"
            else:
                ended.rungs.append({**rung(number - 1, 0.0), "failed": "the loss is not finite"})
        else:  # Scores of few kinds: ties are common.
            ended.rungs.append(rung(number, draw.randint(0, 4) / 4, draw.random(), whole=number == rungs))
        board.settle(afresh=failing)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6), st.floats(1.5, 5))
def test_the_best_share_of_each_rung_goes_on(wanted: int, rungs: int, slots: int, seed: int, reduction: float) -> None:
    board = play("asha", wanted, rungs, slots, seed, reduction)
    assert len(board.entries) == wanted
    assert any(entry.whole for entry in board.entries)
    for number in range(1, rungs):
        here = [entry for entry in board.entries if entry.worth(number) is not None]
        on = [entry for entry in here if entry.worth(number + 1) is not None]
        # Those that were among the best when they went on may have been overtaken since.
        assert len(on) >= min(math.ceil(len(here) / reduction), len(here))
        best = max(here, key=lambda entry: entry.worth(number) or (0.0, 0.0))
        assert best in on
        for entry in here:
            if entry not in on:
                assert board.why(entry).startswith(f"stopped at rung {number}")


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_none_lets_all_go_on_and_median_the_better_half(wanted: int, rungs: int, slots: int, seed: int) -> None:
    assert all(entry.whole for entry in play("none", wanted, rungs, slots, seed).entries)
    assert any(entry.whole for entry in play("median", wanted, rungs, slots, seed).entries)


@given(
    st.sampled_from(["asha", "median", "none"]),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_failures_hold_nobody_up(stop: StopName, wanted: int, rungs: int, slots: int, seed: int) -> None:
    board = play(stop, wanted, rungs, slots, seed, failures=0.4)
    assert all(entry.failed or entry.lost for entry in board.entries) or any(entry.whole for entry in board.entries)
    assert not any(entry.running for entry in board.entries)
    assert all(board.why(entry) for entry in board.entries)


def test_another_comes_in_the_place_of_a_leader_that_fails() -> None:
    failed = {**rung(1, 0.0), "failed": "the loss is not finite"}
    entries = [
        Entry({"x": 1}, [rung(1, 0.9), failed]),
        Entry({"x": 2}, [rung(1, 0.5)]),
        Entry({"x": 3}, [rung(1, 0.4)]),
    ]
    board = Board("asha", 3.0, 2, 3, entries)
    assert board.last() is entries[1]


def test_the_first_ones_do_not_go_all_the_way() -> None:
    board = Board("asha", 3.0, 3, 9, [Entry({"x": 1}, [rung(1, 0.5)]), Entry({"x": 2}, [rung(1, 0.4)])])
    assert board.next() is None
    board.entries.append(Entry({"x": 3}, [rung(1, 0.45)]))
    assert board.next() is board.entries[0]


def test_equal_scores_are_told_apart_by_their_loss() -> None:
    entries = [Entry({"x": number}, [rung(1, 0.3, loss)]) for number, loss in enumerate((0.9, 0.7, 0.8))]
    board = Board("asha", 3.0, 2, 9, entries)
    assert board.next() is entries[1]
    assert board.why(entries[0]) == "waits at rung 1: 2 of 2 others there are ahead"


def test_a_trial_enters_at_its_first_rung() -> None:
    entries = [Entry({"x": 1}, [rung(2, 0.9)]), Entry({"x": 2}, [rung(1, 0.5), rung(2, 0.8)])]
    board = Board("asha", 2.0, 3, 2, entries)
    assert board.last() is entries[0], "rungs have the same number in all trials"


@pytest.mark.parametrize("search", ["tpe", "random"])
def test_no_values_are_proposed_twice(search: Any) -> None:
    space = {"a": Distribution(choice=(1, 2)), "b": Distribution(int=(1, 2))}
    entries: list[Entry] = []
    start = ({"a": 2, "b": 1},)
    while values := propose(search, space, start, entries, 8, 0):
        assert values not in [entry.values for entry in entries]
        entries.append(Entry(values, [rung(1, 0.5, whole=True)]))
    assert entries[0].values == start[0]
    assert len(entries) == 4


@pytest.mark.parametrize("seed", [0, 4295, 2**40])
def test_any_seed_will_do(seed: int) -> None:
    space = {"a": Distribution(log_uniform=(1e-5, 1e-3))}
    assert propose("tpe", space, (), [], 16, seed) != propose("tpe", space, (), [], 16, seed + 1)


def test_what_is_proposed_follows_from_the_trials_alone() -> None:
    space = {"a": Distribution(log_uniform=(1e-5, 1e-3))}
    states = [[rung(1, 0.2)], [rung(1, 0.5), rung(2, 0.7, whole=True)], [], [{**rung(0, 0.0), "failed": "odd"}]]
    entries = [Entry({"a": 1e-4 * (number + 1)}, rungs) for number, rungs in enumerate(states)]
    first, again = (propose("tpe", space, (), entries, 16, 3) for _ in range(2))
    assert first == again
    assert first != propose("tpe", space, (), entries[:3], 16, 3)
