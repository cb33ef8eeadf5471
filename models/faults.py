"""What can be wrong with a microbatch, and what to say of it."""

from dataclasses import dataclass

import torch

NOT_FINITE, OUT_OF_MEMORY, NO_GRADIENT = 1, 2, 3


@dataclass(frozen=True)
class Fault:
    """What is wrong with a microbatch, and what may help."""

    reason: str
    advice: str
    """With places for the recipe's `{section}` and its setting of the texts' `{length}`."""


FAULTS = {
    NOT_FINITE: Fault("the loss is not finite", "lower {section}.learning_rate"),
    OUT_OF_MEMORY: Fault(
        "memory does not suffice",
        "lower {section}.microbatch or {length}, set {section}.activation_checkpointing",
    ),
    NO_GRADIENT: Fault("the gradient is not finite or too large", "lower {section}.learning_rate"),
}
"""By the numbers that workers tell each other."""


@dataclass(frozen=True)
class Skipped:
    """A microbatch that was left out of a step."""

    lane: int
    reason: str
    rows: list[int]
    """The rows' identities."""


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the system's memory did not suffice; torch has no class of its own for the latter."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
