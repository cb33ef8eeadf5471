"""What disturbed a run, made of the history of its groups of workers (`pipelines.training.bulletin.Bulletin`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

GROUPS = "groups.json"
"""The history of a run's groups of workers, in its artifact and, until then, in its working folder."""


@dataclass(frozen=True)
class Interruption:
    """From the last step of one group of workers until the next one was as far."""

    time: str
    """When the last news came of the group before, in UTC."""
    cause: str
    step: int
    """How far the run was, by the last news: they come twice a second."""
    recomputed: int
    """Steps that the next group took again."""
    seconds: float
    """Until the next group was as far, or ended before it was."""
    before: int
    """Workers."""
    after: int


def interruptions(groups: Sequence[dict[str, Any]]) -> list[Interruption]:
    """One between each group and the next."""
    return [
        Interruption(
            time=datetime.fromtimestamp(group["last_seen"], UTC).isoformat(timespec="seconds"),
            cause=group.get("cause", "unknown"),
            step=group["last_step"],
            recomputed=max(group["last_step"] - following["first_step"], 0),
            seconds=round(following.get("caught_up", following["last_seen"]) - group["last_seen"], 1),
            before=group["workers"],
            after=following["workers"],
        )
        for group, following in pairwise(groups)
    ]
