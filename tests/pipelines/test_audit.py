"""The audit: a run that was disturbed in any way has the ledger of one that was not, and what is not exact is told."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from upath import UPath

from cluster.store import Store
from models.feed import Feed, Place
from models.ledger import Ledger, digest
from pipelines.audit import compare
from pipelines.ledgers import read_ledger, write_ledger
from pipelines.prepared import Prepared
from pipelines.training.interruptions import interruptions
from pipelines.training.lanes import feed_over, text_batches
from tests.making import make_prepared

EPOCHS = 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    store = Store.open(str(tmp_path_factory.mktemp("store")))
    return Prepared(make_prepared(store, rows=150, chunk_rows=8).path)


def feed_of(prepared: Prepared, lanes: int = 4) -> Feed:
    return feed_over(prepared.index.splits["train"], lanes, 4, 3)


def take(feed: Feed, prepared: Prepared, ledger: Ledger, steps: int, workers: int) -> None:
    """Goes on for so many steps, or to the end, with so many workers, each of which reads its own lanes."""
    readers = [text_batches(prepared, feed, range(rank, feed.lanes, workers)) for rank in range(workers)]
    for position in range(len(ledger.entries), min(len(ledger.entries) + steps, EPOCHS * feed.steps)):
        digests = [0] * feed.lanes
        for rank, reader in enumerate(readers):
            for lane in range(rank, feed.lanes, workers):
                batch = reader(*divmod(position, feed.steps), lane)
                digests[lane] = digest(batch.rows) if batch else 0
        ledger.append(digests)


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared) -> NDArray[np.int64]:
    feed = feed_of(prepared)
    ledger = Ledger(feed.lanes)
    take(feed, prepared, ledger, EPOCHS * feed.steps, 1)
    return ledger.entries


GROUPS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 12), st.sampled_from(["leaves", "is killed", "takes a checkpoint"])),
    max_size=8,
)


@settings(max_examples=30)
@given(GROUPS)
def test_any_resizes_and_restarts_give_the_undisturbed_ledger(
    prepared: Prepared, undisturbed: NDArray[np.int64], groups: list[tuple[int, int, str]]
) -> None:
    feed = feed_of(prepared)
    committed = np.zeros((0, feed.lanes), dtype=np.int64)
    for workers, steps, end in groups:
        ledger = Ledger(feed.lanes, committed)
        take(feed, prepared, ledger, steps, workers)
        if end == "takes a checkpoint":
            committed = ledger.entries.copy()
            take(feed, prepared, ledger, 3, workers)  # And is killed afterwards.
        elif end == "leaves":
            committed = ledger.entries.copy()
    ledger = Ledger(feed.lanes, committed)
    take(feed, prepared, ledger, EPOCHS * feed.steps, 3)
    assert np.array_equal(ledger.entries, undisturbed)
    assert compare(feed, prepared, ledger.entries, EPOCHS * feed.steps).sentence == "exact"


def _swap(ledger: NDArray[np.int64]) -> NDArray[np.int64]:
    changed = ledger.copy()
    changed[[1, 2]] = changed[[2, 1]]
    return changed


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_swap, r"^not exact: epoch 1: other rows than planned at step 1 lane 0, [^;]*$"),
        (
            lambda ledger: ledger[:-3],
            r"not exact: epoch 2: \d+ rows not consumed; the ledger ends 3 steps before the run",
        ),
        (lambda ledger: ledger[: len(ledger) // 2], r"^not exact: the ledger ends \d+ steps before the run did$"),
        (
            lambda ledger: np.concatenate([ledger[:5], ledger[4:-1]]),
            r"not exact: epoch 1: \d+ rows not consumed, \d+ rows consumed more than once, other .* step 5 lane 0",
        ),
    ],
)
def test_what_is_not_exact_is_told(
    change: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    told: str,
    prepared: Prepared,
    undisturbed: NDArray[np.int64],
) -> None:
    feed = feed_of(prepared)
    assert re.search(told, compare(feed, prepared, change(undisturbed), EPOCHS * feed.steps).sentence)


@dataclass(frozen=True)
class RepeatingFeed(Feed):
    """Gives the rows of the first chunk in place of the second one's."""

    def place(self, epoch: int, step: int, lane: int) -> Place | None:
        place = super().place(epoch, step, lane)
        return Place(0, place.start, place.stop) if place and place.chunk == 1 else place


def test_a_feed_that_repeats_rows_is_found_out(prepared: Prepared) -> None:
    feed = RepeatingFeed(**vars(feed_of(prepared)))
    ledger = Ledger(feed.lanes)
    take(feed, prepared, ledger, feed.steps, 2)
    sentence = compare(feed, prepared, ledger.entries, feed.steps).sentence
    assert "rows not consumed" in sentence
    assert "rows consumed more than once" in sentence


def test_a_ledger_is_read_as_written(tmp_path: Path, undisturbed: NDArray[np.int64]) -> None:
    write_ledger(UPath(tmp_path), undisturbed, len(undisturbed) // EPOCHS)
    assert np.array_equal(read_ledger(UPath(tmp_path)), undisturbed)


def test_interruptions_are_what_lies_between_groups() -> None:
    groups = [
        {"began": 0.0, "workers": 3, "first_step": 0, "last_step": 50, "last_seen": 60.0, "cause": "worker 1 was lost"},
        {"began": 70.0, "workers": 2, "first_step": 40, "last_step": 90, "last_seen": 99.0, "caught_up": 75.0},
    ]
    (found,) = interruptions(groups)
    assert (found.cause, found.step, found.recomputed, found.seconds) == ("worker 1 was lost", 50, 10, 15.0)
    assert (found.before, found.after, found.time) == (3, 2, "1970-01-01T00:01:00+00:00")
