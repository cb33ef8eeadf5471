"""What the command shows of a sweep at work: the trials in a live table, and a line for each that has ended."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from pipelines.progress import Progress, Step
from pipelines.sweeping.trial import FAILED, RUNG, SCORE, WHOLE

_ROWS = 12


@dataclass
class _Row:
    """A trial, and where it is."""

    values: Mapping[str, Any]
    last: Mapping[str, Any] | None = None
    """What it was found to be worth at its last rung."""
    ended: str | None = None
    """Why it has ended."""

    @property
    def worth(self) -> float:
        """The score of a trial that came to the end; less than any where it did not."""
        return float(self.last[SCORE]) if self.last and self.last[WHOLE] else float("-inf")


class Shown:
    """The trials of this command and of those before it."""

    def __init__(self, progress: Progress, step: Step, wanted: int, metric: str, ended: Sequence[_Row]) -> None:
        self._progress, self._step, self._wanted, self._metric = progress, step, wanted, metric
        self._rows = {f"before {number}": row for number, row in enumerate(ended)}
        self._update()

    def began(self, trial: str, values: Mapping[str, Any]) -> None:
        """It runs, perhaps again."""
        self._rows.setdefault(trial, _Row(values))
        self._update()

    def lost(self, trial: str) -> None:
        """Its process or node is gone."""
        values = told_values(self._rows[trial].values)
        self._progress.tell(f"  the trial with {values} was lost and goes on from its last rung", "yellow")

    def found(self, trial: str, result: Mapping[str, Any]) -> None:
        """It was scored at a rung."""
        self._rows[trial].last = result
        self._update()

    def ended(self, trial: str) -> str:
        """It has ended; why."""
        row = self._rows[trial]
        assert row.last is not None
        row.ended = self._why(row)
        number = sum(each.ended is not None for each in self._rows.values())
        said = f"{row.last[SCORE]:.4f} with {told_values(row.values)}"
        told = row.ended if FAILED in row.last else f"{row.ended}, {said}"
        self._progress.tell(f"  trial {number} of {self._wanted}: {told}")
        self._update()
        return row.ended

    def _why(self, row: _Row) -> str:
        last = row.last
        assert last is not None
        if failed := last.get(FAILED):
            return f"cannot be trained with {told_values(row.values)}: {failed}"
        if last[WHOLE]:
            return "finished"
        there = [each.last for each in self._rows.values() if each.last and FAILED not in each.last]
        others = [each for each in there if each[RUNG] > last[RUNG] or (each is not last and each[RUNG] == last[RUNG])]
        better = sum(each[RUNG] > last[RUNG] or each[SCORE] > last[SCORE] for each in others)
        return f"stopped at rung {last[RUNG]}: {better} of {len(others)} others there are ahead"

    def _update(self) -> None:
        rows = list(self._rows.values())
        ended = [row for row in rows if row.ended]
        early = sum(row.worth == float("-inf") for row in ended)
        best = max(ended, key=lambda row: row.worth, default=None)
        found = f"best {best.worth:.4f}" if best and best.worth > float("-inf") else "none has finished yet"
        note = f"{len(rows) - len(ended)} running, {early} stopped early, {found}"
        self._step.update(len(ended), note, total=self._wanted, below=self._table(rows, best))

    def _table(self, rows: Sequence[_Row], best: _Row | None) -> Table:
        """The best, those that run, and of the others the latest, as many as there is room for."""
        names = [path.rpartition(".")[2] for path in rows[0].values] if rows else []
        table = Table("", *names, "rung", self._metric, "", box=None, pad_edge=False, header_style="dim")
        running = [row for row in rows if not row.ended]
        others = [row for row in reversed(rows) if row.ended and row is not best]
        first = [best] if best else []
        room = max(_ROWS - len(first) - len(running), 0)
        for row in (*first, *running, *others[:room]):
            leads, last = row is best, row.last
            table.add_row(
                "best" if leads else "",
                *(told_value(value) for value in row.values.values()),
                f"{last[RUNG]}" if last else "",
                f"{last[SCORE]:.4f}" if last and FAILED not in last else "",
                Text(row.ended or "running"),
                style="bold" if leads else "dim" if row.ended else "",
            )
        if len(others) > room:
            table.caption = f"and {len(others) - room} more that have ended"
        return table


@contextlib.contextmanager
def showing(
    progress: Progress, wanted: int, metric: str, ended: Sequence[tuple[Mapping[str, Any], str]]
) -> Iterator[Shown]:
    """Shows a sweep that wants so many trials, of which some `ended` before: what they found, and why they ended."""
    with progress.step("trials", total=wanted) as step:
        before = [_Row(found["values"], found["rungs"][-1], why) for found, why in ended]
        yield Shown(progress, step, wanted, metric, before)


def told_value(value: Any) -> str:
    """A setting's value, in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def told_values(values: Mapping[str, Any]) -> str:
    """A trial's values, in a few words."""
    return ", ".join(f"{path.rpartition('.')[2]} {told_value(value)}" for path, value in values.items())
