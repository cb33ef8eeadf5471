"""The settings that all training has, whatever is learnt."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from models.settings import Precision, Settings, execution
from pipelines.training.trackers import TrackerName


class _Bounds(Settings):
    """A least and a most; `ALONE` names those of them that a number alone sets."""

    ALONE: ClassVar[tuple[str, ...]]
    NUMBER: ClassVar[type | UnionType]

    min: float
    max: float

    @model_validator(mode="before")
    @classmethod
    def _number(cls, given: Any) -> Any:
        if isinstance(given, cls.NUMBER) and not isinstance(given, bool):
            return dict.fromkeys(cls.ALONE, given)
        if not isinstance(given, Mapping | Settings):
            raise ValueError("must be a number, or a mapping of min and max")
        return given

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min, which is {self.min:g}, must not be above max, which is {self.max:g}")
        return self


class Workers(_Bounds):
    """How many workers train: as many as there is room for, within bounds; a number alone is the most."""

    ALONE = ("max",)
    NUMBER = int

    min: int = Field(1, ge=1, description="With room for fewer, training waits.")
    max: int = Field(1, ge=1, description="With room for more, it takes no more; at most as many as lanes.")


class CheckpointSeconds(_Bounds):
    """Bounds of the time between checkpoints; a number alone is the time."""

    ALONE = ("min", "max")
    NUMBER = int | float

    min: float = Field(10.0, gt=0, description="They come no oftener.")
    max: float = Field(600.0, gt=0, description="They come no rarer.")


class TrainingSettings(Settings):
    """How a model learns, and on what."""

    lanes: int = Field(
        4, ge=1, description="Slots of a step, at least as many as workers; lanes x microbatch is the global batch."
    )
    microbatch: int = Field(8, ge=1, description="Rows in one lane of a step.")
    learning_rate: float = Field(1e-4, gt=0, description="The peak learning rate.")
    schedule: Literal["linear", "cosine", "constant", "wsd"] = Field(
        "linear",
        description="Decay after the warm-up; wsd (warm-up, stable, decay) keeps the rate until the end is near.",
    )
    decay: float = Field(
        0.2, gt=0, le=1, description="Share of the steps after the warm-up during which the rate of wsd falls."
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps during which the rate rises.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decay of weight matrices.")
    clip: float = Field(1.0, gt=0, description="Largest norm of a step's gradient.")
    dropout: float | None = Field(None, ge=0, lt=1, description="Dropout; by default, the encoder's own.")
    precision: Precision = Field(
        "bf16",
        description="Of the forward and backward passes: bf16, fp16 (with loss scaling) or fp32. Where a worker's "
        "hardware lacks bf16, all take fp16 on GPUs and fp32 on CPUs.",
    )
    compile: bool = Field(False, description="Compile the encoder's layers (torch.compile), for speed on GPUs.")
    exact: bool = Field(
        True,
        description="Sum gradients in fixed point, so that any number of workers ends in the same bits.",
    )
    fsdp: bool = execution(
        False,
        description="Spread weights, gradients and the optimizer's state over the workers (FSDP2) where one's memory "
        "does not hold them; gradients are then summed in floating point, so exact must be false.",
    )
    activation_checkpointing: bool = execution(
        False,
        description="Compute the layers again in the backward pass instead of keeping what they made: the same "
        "bits with less memory, in about a third more time.",
    )
    bad_microbatch: Literal["stop", "skip"] = Field(
        "stop",
        description="What to do with one whose loss or gradient is not finite, or for which memory does not suffice.",
    )
    seed: int = Field(0, description="Seed of fresh weights, of random draws and of the order of the rows.")
    threads: int = Field(1, ge=1, description="CPU threads of each worker.")
    workers: Workers = execution(Workers(), description="Training workers: a number, or the least and the most.")
    resize_seconds: float = execution(
        30.0, gt=0, description="How long workers train at least before others that there is room for join them."
    )
    checkpoint_seconds: CheckpointSeconds = execution(
        CheckpointSeconds(),
        description="Time between checkpoints: a number, or bounds for what their cost and the failures suggest.",
    )
    max_failures: int = execution(
        8, ge=0, description="Failures in a row, without a step gained in between, after which the run gives up."
    )
    trackers: tuple[TrackerName, ...] = execution(("tensorboard",), description="Where curves are written.")

    @model_validator(mode="after")
    def _sum_shards_in_floats(self) -> Self:
        if self.fsdp and self.exact:
            raise ValueError("fsdp sums gradients in floating point, not exactly: set exact to false as well")
        return self
