"""Who goes on: what the trials of a sweep were found to be worth at their rungs, and which of them climbs next.

Successive halving as its workers come free (ASHA, Li et al. 2020, arXiv 1810.05934): a trial waits at its rung, without
holding anything, until it is among the best share there; where none is, a new one begins. So the first trials do not go
all the way for want of others, as they do where one may only be stopped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

StopName = Literal["asha", "median", "none"]
SCORE, LOSS, BUDGET, RUNG, TEXTS, FAILED, WHOLE = "score", "loss", "budget", "rung", "texts", "failed", "whole"
"""What a trial tells of a rung: its score; the loss, which counts where scores are equal, as those of classifiers that
only know the most frequent label are; the tokens of a run that ends there; its number; the texts that the trial was
trained on by then, branches included; why it cannot be trained, if so; and whether it is the last one."""
Worth = tuple[float, float]
_MEDIAN_OF = 4


@dataclass(eq=False)
class Entry:
    """A trial, which is its values."""

    values: Mapping[str, Any]
    rungs: list[dict[str, Any]] = field(default_factory=list)
    """What it was found to be worth, in order."""
    running: bool = False
    stopped: bool = False
    """Whether it will not go on, whatever else is found."""
    losses: int = 0
    """How often its process was lost."""
    lost: str | None = None
    """Why it was given up, though nothing is wrong with its values."""

    @property
    def rung(self) -> int:
        """The number of the last rung that it was scored at; 0 for none."""
        return int(self.rungs[-1][RUNG]) if self.rungs else 0

    @property
    def failed(self) -> str | None:
        """Why it cannot be trained."""
        return self.rungs[-1].get(FAILED) if self.rungs else None

    @property
    def whole(self) -> bool:
        """Whether it came to the end."""
        return bool(self.rungs) and bool(self.rungs[-1][WHOLE])

    @property
    def waits(self) -> bool:
        """Whether it may be told to go on."""
        return bool(self.rungs) and not (self.running or self.whole or self.ended)

    @property
    def ended(self) -> bool:
        """Whether it ended before its last rung."""
        return bool(self.stopped or self.failed or self.lost)

    def worth(self, rung: int) -> Worth | None:
        """What it was worth at a rung, None where it was not scored there; the higher, the better."""
        return next(((at[SCORE], -at[LOSS]) for at in self.rungs if at[RUNG] == rung and FAILED not in at), None)


def failure(why: str, last: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is told of a rung that could not be reached, after the `last` one."""
    before = {RUNG: 0, TEXTS: 0} if last is None else {RUNG: last[RUNG], TEXTS: last[TEXTS]}
    return {SCORE: 0.0, LOSS: 0.0, BUDGET: 0, **before, WHOLE: False, FAILED: why}


class Board:
    """The trials in the order in which they were begun; `wanted` of them, each with `rungs` rungs at most."""

    def __init__(
        self, stop: StopName, reduction: float, rungs: int, wanted: int, entries: Sequence[Entry] = ()
    ) -> None:
        self._stop, self._reduction, self._rungs = stop, reduction, rungs
        self.wanted = wanted
        self.entries = list(entries)
        self.settle()

    def next(self) -> Entry | None:
        """A trial that goes on now: of the highest rung that has one."""
        for rung in range(self._rungs - 1, 0, -1):
            for entry in self._waiting(rung):
                if self._goes_on(entry):
                    return entry
        return None

    def last(self) -> Entry | None:
        """A trial that goes on where no more begin: the best share of what there is, rounded up, rung by rung."""
        for rung in range(1, self._rungs):
            if any(entry.running and entry.rung < rung for entry in self.entries):
                return None  # It will come here.
            for entry in self._waiting(rung):
                ahead, others = self.ahead(entry)
                if ahead < self._share(others + 1):
                    return entry
        return None

    @property
    def running(self) -> bool:
        """Whether any trial is."""
        return any(entry.running for entry in self.entries)

    def ahead(self, entry: Entry) -> tuple[int, int]:
        """How many of the others that were scored at a trial's rung are ahead of it, and how many there are; those that
        failed or were lost later hold nobody up.
        """
        own, found = entry.worth(entry.rung), self._worths(entry.rung, but=entry)
        return sum(own is not None and worth > own for worth in found), len(found)

    def settle(self, *, afresh: bool = False) -> list[Entry]:
        """Stops the trials that cannot go on any more, whatever else is found; gives those that this is new of.

        `afresh` after a trial failed or was lost: others may come in its place, who were stopped before.
        """
        found = []
        for entry in self.entries if afresh else ():
            entry.stopped = False
        for rung in range(1, self._rungs):
            there = len(self._worths(rung))
            below = sum(entry.rung < rung and not entry.ended for entry in self.entries)
            most = there + below + self.wanted - len(self.entries)
            for entry in self._waiting(rung):
                match self._stop:
                    case "asha":
                        entry.stopped = self.ahead(entry)[0] >= self._share(most)
                    case "median":
                        entry.stopped = not self._goes_on(entry)
                found += [entry] if entry.stopped else []
        return found

    def why(self, entry: Entry) -> str:
        """Where a trial is, or why it has ended."""
        if entry.running:
            return "running"
        if entry.lost:
            return f"was lost: {entry.lost}"
        if entry.failed:
            return f"cannot be trained: {entry.failed}"
        if entry.whole:
            return "finished"
        if not entry.rungs:
            return "waits to begin again"
        ahead, others = self.ahead(entry)
        does = "stopped" if entry.stopped else "waits"
        return f"{does} at rung {entry.rung}: {ahead} of {others} others there are ahead"

    def _share(self, count: int) -> int:
        return math.ceil(count / self._reduction)

    def _worths(self, rung: int, but: Entry | None = None) -> list[Worth]:
        """Of the trials that were scored at a rung."""
        entries = (entry for entry in self.entries if entry is not but and not (entry.failed or entry.lost))
        return [worth for entry in entries if (worth := entry.worth(rung)) is not None]

    def _waiting(self, rung: int) -> list[Entry]:
        """Those that wait at a rung, the best first."""
        found = [entry for entry in self.entries if entry.waits and entry.rung == rung]
        return sorted(found, key=lambda entry: entry.worth(rung) or (0.0, 0.0), reverse=True)

    def _goes_on(self, entry: Entry) -> bool:
        ahead, others = self.ahead(entry)
        match self._stop:
            case "none":
                return True
            case "median":  # Golovin et al. 2017, of scores that compare as they are.
                return others + 1 < _MEDIAN_OF or 2 * ahead <= others
            case "asha":
                return ahead < int((others + 1) / self._reduction)
