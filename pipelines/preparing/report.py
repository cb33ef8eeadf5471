"""The report of `prepare`: what each step dropped, the labels of each split and how long the texts are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from upath import UPath

from models.labels import LabelColumn
from pipelines.figures import bars, counted_histogram
from pipelines.prepared import SPLITS
from pipelines.report import Figure, Section, Table, Text, render

_SHOWN_CLASSES = 40
_BINS = 40
_MASKED = "masked_"


def write_report(
    path: UPath,
    recipe: str,
    metrics: Mapping[str, Any],
    steps: Mapping[str, Mapping[str, int]],
    label_counts: Mapping[str, Mapping[str, Mapping[str, int]]],
    labels: Sequence[LabelColumn],
    lengths: Mapping[int, int],
) -> None:
    """Writes `report.html`.

    Args:
        path: the file.
        recipe: the recipe's name.
        metrics: the stage's metrics.
        steps: rows dropped and changed by step.
        label_counts: rows by label column, split and class.
        labels: the label columns.
        lengths: rows by length in tokens.
    """
    facts = [
        ("rows in", f"{metrics['rows_in']:,}"),
        ("rows out", f"{metrics['rows_out']:,}"),
        ("rejected", f"{metrics['rejected']:,}"),
        ("tokens", f"{metrics['tokens']:,}"),
        ("texts cut", f"{metrics['truncated']:,}"),
    ]
    sections = [
        steps_section(metrics, steps),
        *(_labels(column, label_counts.get(column.name, {})) for column in labels),
        _lengths(metrics, lengths),
    ]
    render(path, f"{recipe}: the prepared data".removeprefix(": "), sections, facts=facts)


def steps_section(metrics: Mapping[str, Any], steps: Mapping[str, Mapping[str, int]]) -> Section:
    """What each step dropped and changed."""
    rows: list[list[str | int | float | None]] = []
    left = metrics["rows_in"]
    for step, count in steps.items():
        left -= count["dropped"]
        rows.append([step, count["dropped"], count["changed"], left])
    dropped = {step: float(count["dropped"]) for step, count in steps.items() if count["dropped"]}
    conflicts = metrics["conflicting_duplicates"]
    blocks: list[Text | Table | Figure] = [
        Table(
            ("step", "dropped", "changed", "left"),
            rows,
            "Rows in their way through the steps; every dropped row is in rejected/ with its file, row and reason.",
        )
    ]
    if dropped:
        blocks.append(Figure(bars(dropped, "rows dropped"), "Rows that each step dropped."))
    masked: list[list[str | int | float | None]] = [
        [name.removeprefix(_MASKED), count] for name, count in metrics.items() if name.startswith(_MASKED)
    ]
    if masked:
        blocks.append(Table(("personal data", "masked"), masked))
    if conflicts:
        blocks.append(
            Text(f"{conflicts:,} of the duplicates had other labels than the row that was kept (that of the majority).")
        )
    return Section("What each step did", blocks)


def _labels(column: LabelColumn, counts: Mapping[str, Mapping[str, int]]) -> Section:
    splits = [split for split in SPLITS if split in counts]
    total = {name: sum(counts[split].get(name, 0) for split in splits) for name in column.classes}
    frequent = sorted(column.classes, key=lambda name: (-total[name], name))
    rows: list[list[str | int | float | None]] = [
        [name, *(counts[split].get(name, 0) for split in splits), total[name]] for name in frequent
    ]
    shown = {name: float(total[name]) for name in frequent[:_SHOWN_CLASSES]}
    caption = "Rows with each class" + (
        f"; the {_SHOWN_CLASSES} most frequent of {len(frequent)}." if len(frequent) > len(shown) else "."
    )
    kind = "any number of them" if column.multi else "one of them"
    return Section(
        f"Labels: {column.name}",
        [
            Text(f"{len(column.classes)} classes; a text has {kind}."),
            Figure(bars(shown, "rows"), caption),
            Table(("class", *splits, "all"), rows),
        ],
    )


def lengths_figure(lengths: Mapping[int, int]) -> Figure:
    """Texts by length in tokens."""
    values = np.array(sorted(lengths))
    weights = np.array([lengths[int(value)] for value in values])
    edges = np.linspace(0, values.max() + 1, min(_BINS, int(values.max()) + 1) + 1)
    counts, _ = np.histogram(values, bins=edges, weights=weights)
    positions = np.cumsum(weights) / weights.sum()
    quantiles = ", ".join(
        f"{share:.0%} at most {values[np.searchsorted(positions, share)]}" for share in (0.5, 0.9, 0.99)
    )
    return Figure(counted_histogram(edges.tolist(), counts.tolist(), "tokens"), f"Texts by length: {quantiles} tokens.")


def _lengths(metrics: Mapping[str, Any], lengths: Mapping[int, int]) -> Section:
    return Section(
        "Lengths",
        [lengths_figure(lengths), Text(f"{metrics['truncated']:,} texts lost their end to prepare.max_length.")],
    )
