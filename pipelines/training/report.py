"""The fine-tuning report: how the loss fell and what each epoch's validation measured."""

from statistics import fmean
from typing import Any

from upath import UPath

from pipelines.figures import curves
from pipelines.report import Figure, Section, Table, render

_SHOWN = 400


def write_report(out: UPath, recipe: str, metric: str, history: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Writes `report.html` from the steps' losses and the epochs' validations."""
    losses: list[float] = history["losses"]
    validations: list[dict[str, float]] = history["validations"]
    width = max(1, len(losses) // _SHOWN)
    per_epoch = len(losses) / len(validations)
    smooth = [((at + width / 2) / per_epoch, fmean(losses[at : at + width])) for at in range(0, len(losses), width)]
    names = list(validations[0])
    rows = [[epoch + 1, *(float(measured[name]) for name in names)] for epoch, measured in enumerate(validations)]
    curve = [(epoch + 1.0, measured[metric]) for epoch, measured in enumerate(validations)]
    render(
        out / "report.html",
        f"{recipe}: fine-tuning",
        [
            Section(
                "Training loss", [Figure(curves({"loss": smooth}, "epoch", "loss"), f"Means of {width} steps each.")]
            ),
            Section(
                "Validation",
                [
                    Figure(
                        curves({metric: curve}, "epoch", metric), "After each epoch; the best one's weights are kept."
                    ),
                    Table(["epoch", *names], rows, digits=4),
                ],
            ),
            Section("The run", [Table(["", ""], [[name, value] for name, value in metrics.items()], digits=4)]),
        ],
        facts=[
            (f"validation {metric}", f"{validations[metrics['best_epoch'] - 1][metric]:.4f}"),
            ("texts/s", f"{metrics['texts_per_second']:,.0f}"),
            ("padding", f"{metrics['padding_share']:.1%}"),
        ],
    )
