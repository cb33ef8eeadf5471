"""HTML reports: one self-contained file of text, tables and figures, readable offline, in light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from upath import UPath

from cluster.store import telling_storage_errors, write_whole

_FOLDER = Path(__file__).parent / "templates"


def templates(*, html: bool) -> Environment:
    """The templates of reports; what is put into HTML is escaped, and a text keeps its last line's end."""
    return Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )


_TEMPLATES = templates(html=True)

Cell = str | int | float | None


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """Rows under a header. Numbers are aligned right, floats shown with `digits` decimals, None as a dash."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    digits: int = 3
    kind: str = "table"

    def shown(self, cell: Cell) -> str:
        """A cell's text."""
        if cell is None:
            return "–"  # noqa: RUF001 - an en dash is meant
        if isinstance(cell, float):
            return f"{cell:,.{self.digits}f}"
        return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


@dataclass(frozen=True)
class Figure:
    """A picture as SVG (see `pipelines.figures`), with a caption that says what it shows."""

    svg: str
    caption: str = ""
    kind: str = "figure"

    @property
    def markup(self) -> Markup:
        """The SVG as it stands. It is ours, never the user's: matplotlib escapes the text in it."""
        return Markup(self.svg)


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    heading: str
    blocks: Sequence[Text | Table | Figure] = field(default_factory=tuple)


def render(
    path: UPath, title: str, sections: Sequence[Section], *, facts: Sequence[tuple[str, str]] = (), note: str = ""
) -> None:
    """Writes the report to `path`, whole or not at all.

    Args:
        path: the HTML file.
        title: what the report is about.
        sections: its body, with a table of contents made of the headings.
        facts: the few (name, value) that matter most, shown large at the top.
        note: a line below the title.

    Raises:
        ClusterError: it cannot be written.
    """
    html = _TEMPLATES.get_template("report.html.j2").render(
        title=title,
        note=note,
        facts=facts,
        sections=sections,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    with telling_storage_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, html)
