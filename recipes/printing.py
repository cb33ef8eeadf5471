"""How the command prints: tables, sentences, and a console for each stream."""

import sys
from collections.abc import Sequence
from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text


def console_on(file: IO[str] | None = None) -> Console:
    """A console whose tables are not squeezed to 80 columns where there is no terminal to say otherwise."""
    console = Console(file=file or sys.stdout)
    return console if console.is_terminal else Console(file=file or sys.stdout, width=160)


def plain_table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), *, numbers: bool = False) -> Table:
    """A plain table; with `numbers`, all but the first column are right aligned."""
    table = Table(box=None, pad_edge=False, show_header=bool(header))
    for position in range(len(rows[0]) if rows else 0):
        name = header[position] if header else ""
        table.add_column(Text(name), justify="right" if numbers and position else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def say(sentence: str) -> None:
    console_on().print(Text(sentence), soft_wrap=True)
