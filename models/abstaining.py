"""Abstention: what comes of giving no answer where none is likely enough, as measured in validation."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Abstaining:
    """What comes of answering only where the calibrated probability of the likeliest class is high enough."""

    below: float
    """Where it is less than this, there is no answer."""
    answered: float
    """The share of the texts that are answered."""
    accuracy: float
    """How often those answers are right."""


def threshold_for(accuracy: float, found: Sequence[Abstaining]) -> float | None:
    """The lowest threshold above which answers are right so often; None where there is none."""
    return next((each.below for each in found if each.accuracy >= accuracy), None)
