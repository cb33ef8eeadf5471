"""finetune: a pretrained encoder becomes a classifier (Ray Train), exactly, on however many workers."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from models.classifier import ClassifierSpec
from models.labels import LabelColumn
from models.objectives import balanced_weights
from models.precision import Precision
from models.settings import InputError, Settings, execution
from pipelines.ledgers import write_ledger
from pipelines.metrics import check_metric, labelled
from pipelines.prepared import Prepared
from pipelines.pretrained import encoder_identity
from pipelines.stage import Task
from pipelines.training.interruptions import GROUPS
from pipelines.training.lanes import feed_over, read_labels
from pipelines.training.report import write_report
from pipelines.training.trackers import TrackerName
from pipelines.training.worker import WorkerJob
from pipelines.training.workers import train

NAME = "finetune"
FORMAT = 7


class ScratchEncoder(Settings):
    """An encoder with fresh weights."""

    architecture: Literal["bert"] = Field("bert", description="A transformers architecture.")
    hidden_size: int = Field(256, ge=1, description="Width.")
    layers: int = Field(4, ge=1, description="Depth.")
    heads: int = Field(4, ge=1, description="Attention heads.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout probability.")

    @field_validator("heads")
    @classmethod
    def _divide_width(cls, heads: int, info: ValidationInfo) -> int:
        if (width := info.data.get("hidden_size")) and width % heads:
            raise ValueError(f"must divide hidden_size, which is {width}, and {heads} does not")
        return heads


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


class FinetuneSettings(Settings):
    """How the classifier learns."""

    encoder: str | ScratchEncoder = Field(
        description="A folder, `package://NAME/PATH` or hub id of a pretrained encoder, or the shape of a fresh one."
    )
    tune: Literal["full", "head"] = Field("full", description="Train all weights, or only the head's.")
    epochs: int = Field(2, ge=1, description="Passes over the training set.")
    lanes: int = Field(
        4, ge=1, description="Slots of a step, at least as many as workers; lanes x microbatch is the global batch."
    )
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
    precision: Precision = Field(
        "bf16",
        description="Of the forward and backward passes: bf16, fp16 (with loss scaling) or fp32. Where a worker's "
        "hardware lacks bf16, all take fp16 on GPUs and fp32 on CPUs.",
    )
    compile: bool = Field(False, description="Compile the encoder's layers (torch.compile), for speed on GPUs.")
    metric: str = Field("macro_f1", description="The validation metric that picks the best epoch.")
    patience: int | None = Field(None, ge=1, description="Validations without a better metric before stopping.")
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
    seed: int = Field(0, description="Seed of the head's weights, dropout and the order of the rows.")
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


def externals(settings: FinetuneSettings) -> dict[str, str]:
    """The identity of the encoder's weights; none where they are fresh.

    Raises:
        InputError: there is no encoder where the settings say.
    """
    if isinstance(settings.encoder, ScratchEncoder):
        return {}
    return {"encoder": encoder_identity(settings.encoder)}


def run(task: Task) -> dict[str, Any]:
    """Trains into `task.out`: `model/` (the classifier), `history.json`, `tensorboard/`, `report.html`.

    Raises:
        InputError: the settings do not fit the data, or training diverged.
        ClusterError: workers were lost more often than `max_failures`, or nothing more can be written.
    """
    settings: FinetuneSettings = task.settings
    prepared = Prepared(task.inputs["prepare"].path)
    index = prepared.index
    check_metric("finetune.metric", settings.metric, index.labels)
    if "validation" not in index.splits:
        raise InputError("finetune needs rows for validation, but there are none: raise prepare.validation_share.")
    split = index.splits["train"]
    feed = feed_over(split, settings.lanes, settings.microbatch, settings.seed)
    job = WorkerJob(
        settings=settings,
        prepared=task.inputs["prepare"].path,
        out=task.out,
        work=task.work,
        feed=feed,
        spec=ClassifierSpec(labels=index.labels, max_length=index.max_length, pair=index.pair, text=index.text),
        class_weights=_class_weights(settings, prepared),
        recipe=task.recipe,
        fingerprint=task.out.name,
    )
    outcome = train(job, task.progress)
    state = outcome.state
    history = {"losses": state.losses, "validations": state.validations}
    (task.out / "history.json").write_text(json.dumps(history), encoding="utf-8")
    (task.out / GROUPS).write_text(json.dumps(outcome.groups, indent=1), encoding="utf-8")
    (task.out / "skipped.json").write_text(json.dumps(state.skipped, indent=1), encoding="utf-8")
    write_ledger(task.out, state.ledger.entries, feed.steps)
    best = state.validations[state.best_epoch]
    metrics = {
        "train_texts": split.rows,
        "steps": len(state.losses),
        "epochs": len(state.validations),
        "best_epoch": state.best_epoch + 1,
        "stopped_early": state.stopped_early,
        "final_loss": state.losses[-1],
        "texts_per_second": round(state.texts_per_second, 1),
        "padding_share": round(state.padding_share, 4),
        "precision": state.precision,
        "exact_sums": settings.exact,
        "workers": outcome.workers,
        "interruptions": len(outcome.groups) - 1,
        "skipped_texts": sum(len(each["rows"]) for each in state.skipped),
        **{f"validation.{name}": value for name, value in best.items()},
    }
    write_report(task.out, task.recipe, settings.metric, history, metrics, outcome.groups)
    task.progress.table(
        "",
        [
            ("texts trained on", f"{state.texts:,}"),
            ("training texts/s", f"{state.texts_per_second:,.1f}"),
            ("padding", f"{state.padding_share:.1%}"),
            ("computed in", _told_precision(settings.precision, state.precision)),
            *([] if settings.exact else [("gradients summed in", "floating point: the order changes the last bits")]),
            (f"validation {settings.metric}, epoch {state.best_epoch + 1}", f"{state.best:.4f}"),
        ],
    )
    return metrics


def _told_precision(wanted: Precision, used: Precision | None) -> str:
    return f"{used}" if used == wanted else f"{used}: the hardware of a worker has no fast {wanted}"


def _class_weights(settings: FinetuneSettings, prepared: Prepared) -> dict[str, list[float]]:
    """Each column's weights in the order of its classes; empty where all weigh alike."""
    chosen = settings.class_weights
    columns = prepared.index.labels
    if chosen == "none":
        return {}
    if chosen == "balanced":
        return {column.name: _balanced(column, prepared) for column in columns}
    known = {name for column in columns for name in column.classes}
    if unknown := sorted(set(chosen) - known):
        raise InputError(
            f"finetune.class_weights: {unknown[0]!r} is no class; there are {', '.join(sorted(known)[:20])}."
        )
    return {column.name: [chosen.get(name, 1.0) for name in column.classes] for column in columns}


def _balanced(column: LabelColumn, prepared: Prepared) -> list[float]:
    counts: Counter[int] = Counter()
    rows = 0
    split = prepared.index.splits["train"]
    for number in range(sum(file.chunks for file in split.files)):
        name = f"label:{column.name}"
        values = read_labels(prepared.read_chunk("train", number, [name])[name], column)
        values = values[labelled(values)]
        rows += len(values)
        classes: Sequence[int] = np.nonzero(values)[1].tolist() if column.multi else values.tolist()
        counts.update(classes)
    totals = [counts[position] for position in range(len(column.classes))]
    if column.multi:
        # A binary decision for each class: how much a class that holds weighs against one that does not.
        return [(rows - total) / total if total else 1.0 for total in totals]
    return balanced_weights(totals)
