"""finetune: a pretrained encoder becomes a classifier (Ray Train), exactly, on however many workers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from models.architectures import ScratchEncoder
from models.labels import LabelColumn
from models.objectives import balanced_weights
from models.settings import InputError, added
from models.spec import ClassifierSpec
from pipelines.metrics import check_metric, labelled
from pipelines.prepared import Prepared
from pipelines.pretrained import PRETRAINED, encoder_identity
from pipelines.stage import Task
from pipelines.teacher import soft_targets, teacher_identity
from pipelines.training.classifying import Classifying
from pipelines.training.history import how_it_ran, told_precision, write_history
from pipelines.training.lanes import feed_over, read_labels
from pipelines.training.report import write_report
from pipelines.training.settings import TrainingSettings
from pipelines.training.worker import WorkerJob
from pipelines.training.workers import train

NAME = "finetune"
FORMAT = 8

TEACHER_WEIGHT = 0.9
"""The labels should have a considerably lower weight than the teacher (Hinton et al. 2015, section 2)."""
TEACHER_TEMPERATURE = 2.0


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
    keep_layers: int | tuple[int, ...] | None = added(
        None,
        description="Layers of the pretrained encoder that are kept, the first so many or those in a list ([0, 2, 4]); "
        "by default, all.",
    )
    teacher: str | None = added(
        None,
        description="A finished classifier to learn from beside the labels: its folder, or a registered version, "
        "NAME:NUMBER or NAME@ALIAS.",
    )
    teacher_weight: float = added(
        TEACHER_WEIGHT, ge=0, le=1, description="Of what the teacher says; the labels have the rest."
    )
    teacher_temperature: float = added(
        TEACHER_TEMPERATURE,
        gt=0,
        description="Of the softmax of teacher and student, in columns with one class for each text.",
    )

    @model_validator(mode="after")
    def _layers_in_order(self) -> Self:
        kept = self.keep_layers
        if kept is None:
            return self
        if isinstance(kept, tuple) and (not kept or kept[0] < 0 or sorted(set(kept)) != list(kept)):
            raise ValueError("keep_layers: must name layers from 0 on, each once, in their order, as in [0, 2, 4]")
        if isinstance(kept, int) and kept < 1:
            raise ValueError(f"keep_layers: must keep at least one layer, not {kept}")
        if isinstance(self.encoder, ScratchEncoder):
            raise ValueError("keep_layers: an encoder from scratch has as many as encoder.layers says; set that")
        return self

    @model_validator(mode="after")
    def _heard_only_if_there(self) -> Self:
        if self.teacher is None:
            for name, default in (("weight", TEACHER_WEIGHT), ("temperature", TEACHER_TEMPERATURE)):
                if getattr(self, f"teacher_{name}") != default:
                    raise ValueError(f"teacher_{name}: there is no teacher; name one with finetune.teacher")
        return self

    def identity(self) -> dict[str, Any]:
        """Without the teacher's name: what it is, whatever it is called, is among the externals."""
        return {name: value for name, value in super().identity().items() if name != "teacher"}


def externals(settings: FinetuneSettings) -> dict[str, str]:
    """The identities of the encoder's weights and of the teacher.

    Fresh weights, and those that come from the recipe's own `pretrain`, have none here.

    Raises:
        InputError: there is no encoder, or no teacher, where the settings say.
    """
    found = {}
    if not isinstance(settings.encoder, ScratchEncoder) and settings.encoder != PRETRAINED:
        found["encoder"] = encoder_identity(settings.encoder)
    if settings.teacher is not None:
        found["teacher"] = teacher_identity(settings.teacher)
    return found


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
    """What a fine-tuning with these settings learns from the task's inputs; a teacher is asked first.

    Raises:
        InputError: the settings do not fit the data.
        ClusterError: what the teacher says cannot be written.
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
        teacher=None if settings.teacher is None else soft_targets(settings.teacher, prepared, task),
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
