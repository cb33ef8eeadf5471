"""evaluate: what a fine-tuned classifier is worth on the held-out split, and whether that is enough."""

from typing import Any, Literal

from pydantic import Field

from models.settings import Settings
from pipelines.stage import Task

NAME = "evaluate"
FORMAT = 1


class EvaluateSettings(Settings):
    """What is measured, and the minimums that must be met."""

    split: Literal["validation", "test"] = Field("test", description="The split to measure on.")
    slices: tuple[str, ...] = Field((), description="Columns (kept by `data.columns`) to break the metrics down by.")
    baseline: bool = Field(True, description="Whether a TF-IDF and linear baseline is measured on the same split.")
    gate: dict[str, float] = Field(
        {},
        description="Minimums, for example {accuracy: 0.83}; `COLUMN.METRIC` where there are several label columns.",
    )


def externals(settings: EvaluateSettings) -> dict[str, str]:
    """Nothing outside the store."""
    return {}


def run(task: Task) -> dict[str, Any]:
    """Evaluates into `task.out`."""
    raise NotImplementedError
