"""The reports of training: how the loss fell, what validation measured, and what disturbed the run."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from upath import UPath

from pipelines.figures import curves
from pipelines.report import Figure, Section, Table, render
from pipelines.training.interruptions import Interruption, interruptions

_SHOWN = 400


def write_report(
    out: UPath,
    recipe: str,
    metric: str,
    history: dict[str, Any],
    metrics: dict[str, Any],
    groups: Sequence[dict[str, Any]] = (),
) -> None:
    """Writes a fine-tuning's `report.html` from the losses, the validations and the groups of workers."""
    validations: list[dict[str, float]] = history["validations"]
    per_epoch = len(history["losses"]) / len(validations)
    curve = [(epoch + 1.0, measured[metric]) for epoch, measured in enumerate(validations)]
    _render(
        out,
        f"{recipe}: fine-tuning",
        history["losses"],
        ("epoch", per_epoch),
        Section(
            "Validation",
            [
                Figure(curves({metric: curve}, "epoch", metric), "After each epoch; the best one's weights are kept."),
                _table("epoch", [epoch + 1 for epoch in range(len(validations))], validations),
            ],
        ),
        metrics,
        groups,
        [
            (f"validation {metric}", f"{validations[metrics['best_epoch'] - 1][metric]:.4f}"),
            ("texts/s", f"{metrics['texts_per_second']:,.0f}"),
            ("padding", f"{metrics['padding_share']:.1%}"),
        ],
    )


def write_pretraining_report(
    out: UPath, recipe: str, history: dict[str, Any], metrics: dict[str, Any], groups: Sequence[dict[str, Any]] = ()
) -> None:
    """Writes a pretraining's `report.html`."""
    validations: list[dict[str, float]] = history["validations"]
    steps: list[int] = history["validated_at"]
    curve = [(float(step), measured["loss"]) for step, measured in zip(steps, validations, strict=True)]
    told = "Of rows that are not trained on, with the same random draws each time; the lowest one's weights are kept."
    _render(
        out,
        f"{recipe}: pretraining",
        history["losses"],
        ("step", 1.0),
        Section(
            "Validation",
            [Figure(curves({"loss": curve}, "step", "loss, nats"), told), _table("step", steps, validations)],
        ),
        metrics,
        groups,
        [
            ("validation loss", f"{metrics['validation.loss']:.3f}"),
            ("perplexity", f"{metrics['validation.perplexity']:,.1f}"),
            ("bits per byte", f"{metrics['validation.bits_per_byte']:.3f}"),
            ("tokens/s", f"{metrics['tokens_per_second']:,.0f}"),
        ],
    )


def _render(
    out: UPath,
    title: str,
    losses: Sequence[float],
    axis: tuple[str, float],
    validation: Section,
    metrics: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    facts: Sequence[tuple[str, str]],
) -> None:
    """What all training reports have; `axis` is what its curves go over, and how many steps one of it has."""
    name, per_unit = axis
    width = max(1, len(losses) // _SHOWN)
    smooth = [((at + width / 2) / per_unit, fmean(losses[at : at + width])) for at in range(0, len(losses), width)]
    disturbed = interruptions(groups)
    marks = [each.step / per_unit for each in disturbed]
    told = f"Means of {width} steps each." + (" Dashed: interruptions." if marks else "")
    sections = [
        Section("Training loss", [Figure(curves({"loss": smooth}, name, "loss", marks), told)]),
        validation,
        *([_interruptions(disturbed, groups)] if disturbed else []),
        Section("The run", [Table(["", ""], [[name, value] for name, value in metrics.items()], digits=4)]),
    ]
    render(out / "report.html", title, sections, facts=facts)


def _table(unit: str, places: Sequence[int], validations: Sequence[dict[str, float]]) -> Table:
    names = list(validations[0])
    rows = [
        [place, *(float(measured[name]) for name in names)] for place, measured in zip(places, validations, strict=True)
    ]
    return Table([unit, *names], rows, digits=4)


def _interruptions(disturbed: Sequence[Interruption], groups: Sequence[dict[str, Any]]) -> Section:
    """The number of workers over time, and what changed it."""
    start = groups[0]["began"]
    workers: list[tuple[float, float]] = []
    for group in groups:
        begun, ended = ((group[name] - start) / 60 for name in ("began", "last_seen"))
        workers += [(begun, 0), (begun, group["workers"]), (ended, group["workers"]), (ended, 0)]
    rows: list[list[str | int | float | None]] = [
        [each.time, each.cause, each.step, each.recomputed, each.seconds, f"{each.before} to {each.after}"]
        for each in disturbed
    ]
    return Section(
        "Interruptions",
        [
            Figure(
                curves({"workers": workers}, "minutes", "workers"),
                "Workers over time. Rows, order and weights are those of a run without interruptions.",
            ),
            Table(["time (UTC)", "cause", "at step", "steps taken again", "seconds lost", "workers"], rows, digits=1),
        ],
    )
