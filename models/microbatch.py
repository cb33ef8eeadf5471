"""Microbatches, and what came of a step over them."""

from dataclasses import dataclass

from torch import Tensor

from models.faults import Skipped


@dataclass(frozen=True)
class Batch:
    """A microbatch: `inputs` are the model's keyword arguments, each [texts, longest]."""

    inputs: dict[str, Tensor]
    """Among them `attention_mask`, zero for padding alone."""
    labels: dict[str, Tensor]
    rows: list[int]
    """The rows' identities."""
    weight: int
    """What its loss is a sum over, at least 1: texts, or tokens to predict."""


@dataclass(frozen=True)
class StepResult:
    """What a step of all workers did."""

    loss: float
    """The mean over what was to be predicted."""
    texts: int
    """None, and no weight has changed, where all lanes were dry or skipped."""
    tokens: int
    """Padding left out."""
    padded: int
    """Tokens, padding included."""
    digests: list[int]
    """Of each lane's rows, by all workers: the step's line in the ledger; negative where the lane was skipped."""
    flag: int
    """What the first worker flagged (see `LaneTrainer.step`)."""
    skipped: list[Skipped]
