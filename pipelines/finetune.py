"""finetune: a pretrained encoder becomes a classifier (Ray Train), exactly, on however many workers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from models.architectures import ScratchEncoder
from models.labels import LabelColumn
from models.objectives import balanced_weights
from models.settings import InputError
from models.spec import ClassifierSpec
from pipelines.metrics import check_metric, labelled
from pipelines.prepared import Prepared
from pipelines.pretrained import PRETRAINED, encoder_identity
from pipelines.stage import Task
from pipelines.training.classifying import Classifying
from pipelines.training.history import how_it_ran, told_precision, write_history
from pipelines.training.lanes import feed_over, read_labels
from pipelines.training.report import write_report
from pipelines.training.settings import TrainingSettings
from pipelines.training.worker import WorkerJob
from pipelines.training.workers import train

NAME = "finetune"
FORMAT = 8


class FinetuneSettings(TrainingSettings):
    """How the classifier learns."""

    encoder: str | ScratchEncoder = Field(
        description="A folder, `package://NAME/PATH` or hub id of a pretrained encoder, the shape of a fresh one, or "
        "`pretrain`: the one that the recipe pretrains."
    )
    tune: Literal["full", "head"] = Field("full", description="Train all weights, or only the head's.")
    epochs: int = Field(2, ge=1, description="Passes over the training set.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    class_weights: Literal["none", "balanced"] | dict[str, float] = Field(
        "none",
        description="Weights of the classes in the loss: none, inversely to their frequency, or by name.",
    )
    metric: str = Field("macro_f1", description="The validation metric that picks the best epoch.")
    patience: int | None = Field(None, ge=1, description="Validations without a better metric before stopping.")


def externals(settings: FinetuneSettings) -> dict[str, str]:
    """The identity of the encoder's weights; none where they are fresh, or come from the recipe's own `pretrain`.

    Raises:
        InputError: there is no encoder where the settings say.
    """
    if isinstance(settings.encoder, ScratchEncoder) or settings.encoder == PRETRAINED:
        return {}
    return {"encoder": encoder_identity(settings.encoder)}


def run(task: Task) -> dict[str, Any]:
    """Trains into `task.out`: `model/` (the classifier), `history.json`, `tensorboard/`, `report.html`.

    Raises:
        InputError: the settings do not fit the data, or training diverged.
        ClusterError: workers were lost more often than `max_failures`, or nothing more can be written.
    """
    settings: FinetuneSettings = task.settings
    taken_over: dict[str, Any] = {}
    if "sweep" in task.inputs:
        from pipelines.sweeping.best import best_values, swept  # Imports Optuna.

        taken_over = best_values(task.inputs["sweep"].path)
        settings = swept(settings, taken_over, NAME)
        task.progress.tell("  from the sweep: " + ", ".join(f"{path}={value}" for path, value in taken_over.items()))
    lesson = lesson_of(task, settings)
    split = Prepared(lesson.prepared).index.splits["train"]
    feed = feed_over(split, settings.lanes, settings.microbatch, settings.seed)
    job = WorkerJob(
        lesson=lesson,
        out=task.out,
        work=task.work,
        feed=feed,
        steps=settings.epochs * feed.steps,
        validate_every=feed.steps,
        patience=settings.patience,
        recipe=task.recipe,
        fingerprint=task.out.name,
    )
    outcome = train(job, task.progress)
    state = outcome.state
    history = write_history(task.out, outcome, feed)
    best = state.validations[state.best_validation]
    metrics = {
        "train_texts": split.rows,
        "steps": len(state.losses),
        "steps_taken": state.taken,
        "epochs": len(state.validations),
        "best_epoch": state.best_validation + 1,
        "stopped_early": state.stopped_early,
        "final_loss": state.losses[-1],
        "texts_per_second": round(state.texts_per_second, 1),
        "padding_share": round(state.padding_share, 4),
        **how_it_ran(outcome, exact=settings.exact),
        "skipped_texts": sum(len(each["rows"]) for each in state.skipped),
        **{f"swept.{path}": value for path, value in taken_over.items()},
        **{f"validation.{name}": value for name, value in best.items()},
    }
    write_report(task.out, task.recipe, settings.metric, history, metrics, outcome.groups)
    task.progress.table(
        "",
        [
            ("texts trained on", f"{state.texts:,}"),
            ("training texts/s", f"{state.texts_per_second:,.1f}"),
            ("padding", f"{state.padding_share:.1%}"),
            ("computed in", told_precision(settings.precision, state.precision)),
            *([] if settings.exact else [("gradients summed in", "floating point: the order changes the last bits")]),
            (f"validation {settings.metric}, epoch {state.best_validation + 1}", f"{state.best:.4f}"),
        ],
    )
    return metrics


def lesson_of(task: Task, settings: FinetuneSettings) -> Classifying:
    """What a fine-tuning with these settings learns from the task's inputs.

    Raises:
        InputError: the settings do not fit the data.
    """
    prepared = Prepared(task.inputs["prepare"].path)
    index = prepared.index
    check_metric("finetune.metric", settings.metric, index.labels)
    if "validation" not in index.splits:
        raise InputError("finetune needs rows for validation, but there are none: raise prepare.validation_share.")
    return Classifying(
        settings=settings,
        prepared=prepared.folder,
        encoder=settings.encoder if PRETRAINED not in task.inputs else str(task.inputs[PRETRAINED].path / "model"),
        spec=ClassifierSpec(labels=index.labels, max_length=index.max_length, pair=index.pair, text=index.text),
        class_weights=class_weights_of(settings, prepared),
    )


def class_weights_of(settings: FinetuneSettings, prepared: Prepared) -> dict[str, list[float]]:
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
