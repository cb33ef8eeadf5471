"""finetune: a pretrained encoder becomes a classifier (Ray Train), exactly, on however many workers."""

from typing import Any, Literal

from pydantic import Field

from models.settings import Settings, execution
from pipelines.stage import Task

NAME = "finetune"
FORMAT = 1


class ScratchEncoder(Settings):
    """An encoder with fresh weights."""

    architecture: Literal["bert"] = Field("bert", description="A transformers architecture.")
    hidden_size: int = Field(256, description="Width.")
    layers: int = Field(4, description="Depth.")
    heads: int = Field(4, description="Attention heads.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout probability.")


class FinetuneSettings(Settings):
    """How the classifier learns."""

    encoder: str | ScratchEncoder = Field(
        description="A folder, `package://NAME/PATH` or hub id of a pretrained encoder, or the shape of a fresh one."
    )
    train: Literal["full", "head"] = Field("full", description="All weights, or only the head's.")
    epochs: int = Field(2, ge=1, description="Passes over the training set.")
    lanes: int = Field(4, ge=1, description="Slots of a step; lanes x microbatch is the global batch.")
    microbatch: int = Field(8, ge=1, description="Texts in one lane of a step.")
    learning_rate: float = Field(1e-4, gt=0, description="The peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Decay after the warm-up.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps during which the rate rises.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decay of weight matrices.")
    clip: float = Field(1.0, gt=0, description="Largest norm of a step's gradient.")
    dropout: float | None = Field(None, ge=0, lt=1, description="Dropout; by default, the encoder's own.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    class_weights: Literal["none", "balanced"] | dict[str, float] = Field(
        "none",
        description="Weights of the classes in the loss: none, inversely to their frequency, or by name.",
    )
    precision: Literal["bf16", "fp32"] = Field("bf16", description="Of the forward and backward passes (autocast).")
    metric: str = Field("macro_f1", description="The validation metric that picks the best epoch.")
    patience: int | None = Field(None, ge=1, description="Validations without a better metric before stopping.")
    seed: int = Field(0, description="Seed of the head's weights, dropout and the order of the rows.")
    threads: int = Field(1, ge=1, description="CPU threads of each worker.")
    workers: int = execution(1, ge=1, description="Training workers, at most as many as lanes.")
    checkpoint_seconds: float = execution(60.0, gt=0, description="Time between checkpoints.")
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = execution(
        ("tensorboard",), description="Where curves are written."
    )


def externals(settings: FinetuneSettings) -> dict[str, str]:
    """The identity of the encoder's weights."""
    raise NotImplementedError


def run(task: Task) -> dict[str, Any]:
    """Trains into `task.out`."""
    raise NotImplementedError
