"""How far a training run is, and how a worker leaves it: what all processes of a run know of.

Whoever only carries it (Ray Train's controller) is spared the import of what trains, which takes seconds.
"""

from dataclasses import dataclass, field
from typing import Any

from models.ledger import Ledger
from models.settings import Precision


class LeftError(Exception):
    """A worker has left on an order, after a checkpoint: another group of workers goes on from there."""


@dataclass
class FitState:
    """How far a run is, and what has been seen so far."""

    ledger: Ledger
    """Of the rows that each lane of each step consumed."""
    taken: int = 0
    """Steps; an epoch's first step follows the last one of the epoch before."""
    losses: list[float] = field(default_factory=list)
    """Of each step since the beginning; steps without texts have none."""
    validations: list[dict[str, float]] = field(default_factory=list)
    best_validation: int = -1
    """Which one, from 0."""
    best: float = float("-inf")
    stopped_early: bool = False
    texts: int = 0
    seconds: float = 0.0
    """Of training steps and their checkpoints, over all restarts; what a killed worker took along is not counted."""
    worker_seconds: float = 0.0
    """Of the steps, over all workers that there were."""
    validated_at: list[int] = field(default_factory=list)
    """Of each validation, after how many steps."""
    tokens: int = 0
    padded: int = 0
    precision: Precision | None = None
    """What is computed in: decided once, when the run begins, and kept through all restarts."""
    cost: dict[str, float] = field(default_factory=dict)
    """What the lesson says that the model and the device can do (`Lesson.cost`)."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Microbatches that were left out: `epoch`, `step`, `lane`, `reason` and `rows`."""

    @property
    def texts_per_second(self) -> float:
        """Training throughput."""
        return self.texts / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Training throughput, padding left out."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that was padding."""
        return 1 - self.tokens / self.padded if self.padded else 0.0
