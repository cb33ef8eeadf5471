"""Who answers what: a table that every replica follows, and what replicas tell of it.

Both are in the cluster's own key-value store. The process that serves (`shoal serve`) writes the table; replicas read
it every half second and are told nothing otherwise, so that one which starts, or starts again, sees what the others
see. A replica that has done what a table asks says so by its revision; whoever wrote it waits for that.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.exchange import LIFETIME_S, Exchange, latest
from serve.model import ServedModel

LOOK_S = 0.5
"""How often a replica looks at the table."""

BOUNDS_MS = tuple(1.05**power for power in range(240))
"""Upper bounds of the bins that latencies are counted in: to a twentieth exactly, from 1 ms to two minutes."""

Arm = Literal["stable", "candidate"]

_NAMESPACE = "shoal-traffic"
_TABLE = "table"


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Candidate(_Told):
    """A version on trial beside the one that answers."""

    id: str
    """Of the version: `NAME:NUMBER`."""
    shadow: bool = False
    """Whether it is asked what the other has answered, and nobody gets its answers."""
    share: float = Field(0.0, ge=0, le=1)
    """Of the requests that it answers."""


class Table(_Told):
    """Who answers what."""

    revision: int = 0
    """Grows with each table; counts begin anew with it."""
    model: dict[str, object] = {}
    """What answers, as `ServedModel.as_json` has it."""
    candidate: Candidate | None = None
    others: dict[str, str] = {}
    """By name in `/models/NAME/...`, the version (`NAME:NUMBER`) that answers there."""

    @property
    def served(self) -> ServedModel:
        """What answers."""
        return ServedModel.from_json(self.model)


class Counts(_Told):
    """What came of one arm's requests."""

    requests: int = 0
    errors: int = 0
    """That this arm could not answer, though the other one could (or, for the stable one, 5xx)."""
    milliseconds: list[int] = Field(default_factory=lambda: [0] * (len(BOUNDS_MS) + 1))
    """How many answers took up to each of `BOUNDS_MS`, and longer."""

    def add(self, seconds: float, *, failed: bool = False) -> None:
        """Counts a request; the time of one that failed says nothing."""
        self.requests += 1
        if failed:
            self.errors += 1
        else:
            self.milliseconds[bisect_left(BOUNDS_MS, seconds * 1000)] += 1

    @property
    def answered(self) -> int:
        """Requests without its errors."""
        return self.requests - self.errors

    def quantile_ms(self, share: float) -> float:
        """The time within which such a share was answered, to a twentieth exactly; 0 before the first answer."""
        wanted, seen = share * sum(self.milliseconds), 0
        for bound, count in zip((*BOUNDS_MS, float("inf")), self.milliseconds, strict=True):
            seen += count
            if count and seen >= wanted:
                return bound
        return 0.0


class Tally(_Told):
    """What came of a table's requests."""

    stable: Counts = Field(default_factory=Counts)
    candidate: Counts = Field(default_factory=Counts)
    compared: int = 0
    """Answers (each label column of each text) that both have given."""
    agreed: int = 0
    """Of these, those with the same label."""

    def arm(self, name: Arm) -> Counts:
        """One arm's counts."""
        return self.stable if name == "stable" else self.candidate

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            stable=_sum(self.stable, other.stable),
            candidate=_sum(self.candidate, other.candidate),
            compared=self.compared + other.compared,
            agreed=self.agreed + other.agreed,
        )


class Report(_Told):
    """What a replica tells of the table that it follows."""

    revision: int
    tally: Tally = Field(default_factory=Tally)
    trouble: str = ""
    """Why it cannot do what a later table asks."""
    refused: int = -1
    """The revision of that table."""


def _sum(one: Counts, other: Counts) -> Counts:
    return Counts(
        requests=one.requests + other.requests,
        errors=one.errors + other.errors,
        milliseconds=[a + b for a, b in zip(one.milliseconds, other.milliseconds, strict=True)],
    )


def write_table(table: Table) -> None:
    """Puts a table before all replicas, those that start later too."""
    Exchange(_NAMESPACE, _TABLE).put(table.model_dump_json())


def read_table() -> Table | None:
    """The latest table, or None where none was written."""
    text = Exchange(_NAMESPACE, _TABLE).get()
    return None if text is None else Table.model_validate_json(text)


def remove_table() -> None:
    """Takes the table away."""
    Exchange(_NAMESPACE, _TABLE).remove()


class Reports:
    """One replica's report, told to whoever asks for `reports`."""

    def __init__(self, replica: str) -> None:
        self._exchange = Exchange(f"{_NAMESPACE}-reports", replica)

    def put(self, report: Report) -> None:
        """Tells it."""
        self._exchange.publish(report.model_dump_json())


def reports(lifetime_s: float = LIFETIME_S) -> dict[str, Report]:
    """By replica, what it has told in the last `lifetime_s`; while it loads a version a replica tells nothing."""
    pages = latest(f"{_NAMESPACE}-reports", lifetime_s)
    return {replica: Report.model_validate_json(page) for replica, page in pages.items()}


def summed(told: Iterable[Report], revision: int) -> Tally:
    """What came of the requests under the table of this revision, at all replicas."""
    return sum((each.tally for each in told if each.revision == revision), Tally())


class Board:
    """The table that this replica follows, and its tally; requests and a thread that looks use it at once."""

    def __init__(self, table: Table) -> None:
        self._lock = threading.Lock()
        self.table = table
        self._tally = Tally()

    def turn_to(self, table: Table) -> None:
        """Follows another table, and counts anew."""
        with self._lock:
            self.table, self._tally = table, Tally()

    def answered(self, revision: int, arm: Arm, started: float, *, failed: bool = False) -> None:
        """Counts a request that began (by `time.perf_counter`) under the table of this revision."""
        with self._lock:
            if revision == self.table.revision:
                self._tally.arm(arm).add(time.perf_counter() - started, failed=failed)

    def compared(self, revision: int, agreed: int, of: int) -> None:
        """Counts answers that both arms have given."""
        with self._lock:
            if revision == self.table.revision:
                self._tally.compared += of
                self._tally.agreed += agreed

    def report(self) -> Report:
        """What there is to tell."""
        with self._lock:
            return Report(revision=self.table.revision, tally=self._tally.model_copy(deep=True))
