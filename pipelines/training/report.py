"""The fine-tuning report: how the loss fell and what each epoch's validation measured."""

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
    """Writes `report.html` from the steps' losses, the epochs' validations and the groups of workers."""
    losses: list[float] = history["losses"]
    validations: list[dict[str, float]] = history["validations"]
    width = max(1, len(losses) // _SHOWN)
    per_epoch = len(losses) / len(validations)
    smooth = [((at + width / 2) / per_epoch, fmean(losses[at : at + width])) for at in range(0, len(losses), width)]
    disturbed = interruptions(groups)
    marks = [each.step / per_epoch for each in disturbed]
    told = f"Means of {width} steps each." + (" Dashed: interruptions." if marks else "")
    names = list(validations[0])
    rows = [[epoch + 1, *(float(measured[name]) for name in names)] for epoch, measured in enumerate(validations)]
    curve = [(epoch + 1.0, measured[metric]) for epoch, measured in enumerate(validations)]
    render(
        out / "report.html",
        f"{recipe}: fine-tuning",
        [
            Section("Training loss", [Figure(curves({"loss": smooth}, "epoch", "loss", marks), told)]),
            Section(
                "Validation",
                [
                    Figure(
                        curves({metric: curve}, "epoch", metric), "After each epoch; the best one's weights are kept."
                    ),
                    Table(["epoch", *names], rows, digits=4),
                ],
            ),
            *([_interruptions(disturbed, groups)] if disturbed else []),
            Section("The run", [Table(["", ""], [[name, value] for name, value in metrics.items()], digits=4)]),
        ],
        facts=[
            (f"validation {metric}", f"{validations[metrics['best_epoch'] - 1][metric]:.4f}"),
            ("texts/s", f"{metrics['texts_per_second']:,.0f}"),
            ("padding", f"{metrics['padding_share']:.1%}"),
        ],
    )


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
