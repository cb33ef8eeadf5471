"""The report of `pack`: what was left out, the mixture of the sources, and how long the documents are."""

from collections.abc import Mapping, Sequence
from typing import Any

from upath import UPath

from pipelines.preparing.report import lengths_figure, steps_section
from pipelines.report import Section, Table, Text, render


def write_report(
    path: UPath,
    recipe: str,
    metrics: Mapping[str, Any],
    steps: Mapping[str, Mapping[str, int]],
    mixture: Sequence[tuple[str, int, float, float]],
    lengths: Mapping[int, int],
    length: int,
) -> None:
    """Writes `report.html`. `mixture` has each source's name, tokens, times in an epoch and share of it."""
    facts = [
        ("documents", f"{metrics['documents']:,}"),
        ("tokens", f"{metrics['tokens']:,}"),
        ("rows", f"{metrics['train_rows'] + metrics['validation_rows']:,}"),
        ("padding", f"{metrics['padding_share']:.2%}"),
    ]
    split = (
        f"Documents longer than a row of {length} tokens are split: {metrics['documents_longer_than_a_row']:,}. Of the "
        f"others {metrics['shorter_documents_split']:.2%} are, so that rows are full. No token is lost."
    )
    table = Table(
        ["source", "tokens", "times in an epoch", "share"],
        [[name, tokens, times, share] for name, tokens, times, share in mixture],
        "Of the training split.",
    )
    sections = [
        steps_section({**metrics, "conflicting_duplicates": 0}, steps),
        Section("Sources", [table]),
        Section("Lengths of documents", [lengths_figure(lengths), Text(split)]),
    ]
    render(path, f"{recipe}: the packed corpus".removeprefix(": "), sections, facts=facts)
