"""Progress of long steps: bars and tables on a terminal, a line now and then where there is none."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

_QUIET_INTERVAL_S = 30.0


class Step:
    """One long step: told how far it is, shown as a bar or, without a terminal, as a line each 30 s."""

    def __init__(self, progress: "Progress", name: str, total: float | None) -> None:
        self._progress = progress
        self._name = name
        self._total = total
        self._task: TaskID | None = None
        self._told = time.monotonic()
        if progress.bars:
            self._task = progress.bars.add_task(name, total=total)

    def update(
        self, completed: float, note: str = "", total: float | None = None, below: RenderableType | None = None
    ) -> None:
        """Sets how much is done; `note` is a few words such as the loss or the rate, `below` stands under the bar."""
        self._total = total if total is not None else self._total
        if self._progress.bars and self._task is not None:
            text = f"{escape(self._name)}  [dim]{escape(note)}[/dim]" if note else escape(self._name)
            self._progress.bars.below = below
            self._progress.bars.update(self._task, completed=completed, total=self._total, description=text)
        elif time.monotonic() - self._told > _QUIET_INTERVAL_S:
            self._told = time.monotonic()
            of = f" of {self._total:,.0f}" if self._total else ""
            self._progress.tell(f"{self._name}: {completed:,.0f}{of}  {note}".rstrip())


class _Bars(Bars):
    """Bars, and what stands under them."""

    below: RenderableType | None = None

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.below is not None:
            yield self.below


class Progress:
    """Where a command tells the user how far it is."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bars: _Bars | None = None

    def tell(self, sentence: str, style: str = "") -> None:
        """Prints a sentence as it is: paths, names and errors may have brackets in them."""
        self.console.print(Text(sentence, style), soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Frames one stage's output: its name before, the seconds it took after."""
        started = time.monotonic()
        self.console.print(f"[bold]{name}[/bold]")
        yield
        self.console.print(f"[bold]{name}[/bold] done in {time.monotonic() - started:,.1f} s")

    @contextlib.contextmanager
    def step(self, name: str, total: float | None = None) -> Iterator[Step]:
        """Shows a bar for one long step while the block runs."""
        if not self.console.is_terminal or self.bars:
            yield Step(self, name, total)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with _Bars(*columns, console=self.console, transient=True) as self.bars:
            try:
                yield Step(self, name, total)
            finally:
                self.bars = None

    def table(self, title: str, rows: list[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
        """Prints a short table; the first column is left aligned, the others right."""
        table = Table(title=title, title_justify="left", show_header=bool(header), box=None, pad_edge=False)
        width = len(header) or (len(rows[0]) if rows else 0)
        for position in range(width):
            name = header[position] if header else ""
            table.add_column(name, justify="left" if position == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
