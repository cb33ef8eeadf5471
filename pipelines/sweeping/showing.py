"""What the command shows of a sweep at work: the trials in a live table, and a line for whatever was found."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from pipelines.progress import Progress, Step
from pipelines.sweeping.board import RUNG, SCORE, Board, Entry

_ROWS = 12


class Shown:
    """The trials of a board."""

    def __init__(self, progress: Progress, step: Step, metric: str, board: Board) -> None:
        self._progress, self._step, self._metric, self._board = progress, step, metric, board
        self.update()

    def tell(self, sentence: str) -> None:
        """Says something of the sweep."""
        self._progress.tell(f"  {sentence}")

    def scored(self, entry: Entry) -> None:
        """A trial was scored at a rung, or cannot be trained."""
        said = "" if entry.failed else f"{entry.rungs[-1][SCORE]:.4f}, "
        self._progress.tell(f"  {self._named(entry)}: {said}{self._board.why(entry)}")
        self.update()

    def again(self, entry: Entry, why: str) -> None:
        """It was lost, and begins again."""
        self._progress.tell(f"  {self._named(entry)}: was lost and goes on from its last rung ({why})", "yellow")
        self.update()

    def lost(self, entry: Entry) -> None:
        """It was given up."""
        self._progress.tell(f"  {self._named(entry)}: {self._board.why(entry)}", "yellow")
        self.update()

    def update(self) -> None:
        """Shows how things stand."""
        entries = self._board.entries
        whole = sorted(
            (each for each in entries if each.whole), key=lambda each: each.worth(each.rung) or (), reverse=True
        )
        running = [each for each in entries if each.running]
        others = [each for each in reversed(entries) if each not in running and each not in whole[:1]]
        failed = sum(bool(each.failed or each.lost) for each in entries)
        waiting = len(entries) - len(running) - len(whole) - failed
        best = f"best {whole[0].rungs[-1][SCORE]:.4f}" if whole else "none has finished yet"
        counts = f"{len(running)} running, {waiting} waiting or stopped, {len(whole)} finished"
        note = f"{counts}, {failed} failed, {best}" if failed else f"{counts}, {best}"
        room = max(_ROWS - len(whole[:1]) - len(running), 0)
        table = self._table([*whole[:1], *running, *others[:room]], whole[0] if whole else None)
        if len(others) > room:
            table.caption = f"and {len(others) - room} more"
        self._step.update(len(entries) - len(running), note, total=self._board.wanted, below=table)

    def _table(self, shown: list[Entry], best: Entry | None) -> Table:
        paths = list(shown[0].values) if shown else []
        names = [path.rpartition(".")[2] for path in paths]
        table = Table("", *names, "rung", self._metric, "", box=None, pad_edge=False, header_style="dim")
        for entry in shown:
            last = entry.rungs[-1] if entry.rungs and not entry.failed else None
            table.add_row(
                "best" if entry is best else "",
                *(Text(told_value(entry.values[path])) for path in paths),
                f"{last[RUNG]}" if last else "",
                f"{last[SCORE]:.4f}" if last else "",
                Text(self._board.why(entry)),
                style="bold" if entry is best else "" if entry.running else "dim",
            )
        return table

    def _named(self, entry: Entry) -> str:
        number = next(place for place, each in enumerate(self._board.entries) if each is entry)
        return f"trial {number + 1} of {self._board.wanted} ({told_values(entry.values)})"


@contextlib.contextmanager
def showing(progress: Progress, metric: str, board: Board) -> Iterator[Shown]:
    """Shows a sweep while the block runs."""
    with progress.step("trials", total=board.wanted) as step:
        yield Shown(progress, step, metric, board)


def told_value(value: Any) -> str:
    """A setting's value, in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def told_values(values: Mapping[str, Any]) -> str:
    """A trial's values, in a few words."""
    return ", ".join(f"{path.rpartition('.')[2]} {told_value(value)}" for path, value in values.items())
