"""evaluate: what a fine-tuned classifier is worth on the held-out split, and whether that is enough.

Writes into its artifact

    metrics.json         everything measured
    reference.json       what texts and answers look like on the validation split (`models.drift.Reference`), for an
                         endpoint to tell drift by; on the measured split where there is no validation split
    calibration.json     the temperature of each label column, fitted on the validation split: {column: temperature}
    abstention.json      of each single-label column, for thresholds on the calibrated probability: {column: [{below,
                         answered, accuracy}]}, measured on the validation split
    predictions.parquet  row, and for each label column label:NAME, predicted:NAME, probability:NAME and
                         probability:NAME:CLASS, calibrated
    report.html          the same with pictures
    model_card.md        what a user of the model should know
"""

import json
from dataclasses import asdict
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from cluster.store import telling_storage_errors, write_whole
from models.labels import LabelColumn
from models.settings import InputError, Precision, Settings
from pipelines.evaluating.baseline import measure_baseline
from pipelines.evaluating.measuring import Evaluation, measure
from pipelines.evaluating.model_card import write_model_card
from pipelines.evaluating.reference import measure_reference
from pipelines.evaluating.report import write_report
from pipelines.evaluating.scoring import Scored, Scoring, score
from pipelines.metrics import check_metric, metric_of, metric_problem
from pipelines.predicting.predictions import class_names, prediction_columns
from pipelines.prepared import Prepared
from pipelines.stage import Task

NAME = "evaluate"
FORMAT = 4

WITHOUT_PRETRAINING = "without_pretraining"
"""The fine-tuning of the encoder as it was before the recipe's own pretraining, among the inputs."""


class GateError(InputError):
    """The classifier falls short of the recipe's minimums; the sentence names each, its value and where to look."""


class EvaluateSettings(Settings):
    """What is measured, and the minimums that must be met."""

    split: Literal["validation", "test"] = Field("test", description="The split to measure on.")
    slices: tuple[str, ...] = Field((), description="Columns (kept by `data.columns`) to break the metrics down by.")
    baseline: bool = Field(True, description="Whether a TF-IDF and linear baseline is measured on the same split.")
    without_pretraining: bool = Field(
        False,
        description="Whether the same fine-tuning is also done without the recipe's own pretraining, and measured "
        "beside.",
    )
    precision: Precision = Field("bf16", description="Of the computation; bf16 only where the hardware has it.")
    gate: dict[str, float] = Field(
        {},
        description="Minimums, for example {accuracy: 0.83}; `COLUMN.METRIC` where there are several label columns.",
    )

    @field_validator("gate")
    @classmethod
    def _known_shares(cls, gate: dict[str, float]) -> dict[str, float]:
        for name, minimum in gate.items():
            if problem := metric_problem(name):
                raise ValueError(problem)
            if not 0 <= minimum <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, so {minimum:g} is no minimum for it")
        return gate


def externals(settings: EvaluateSettings) -> dict[str, str]:
    """Nothing outside the store."""
    return {}


def run(task: Task) -> dict[str, Any]:
    """Evaluates into `task.out`.

    Raises:
        GateError: a minimum of the gate is not met; all files stand in `task.out` for the user to look at.
        InputError: the gate or the slices name what is not there, or the split is empty.
    """
    settings: EvaluateSettings = task.settings
    prepared = Prepared(task.inputs["prepare"].path)
    columns = prepared.index.labels
    _check(settings, prepared)
    splits = list(dict.fromkeys(s for s in ("validation", settings.split) if _rows(prepared, s)))
    scoring = score(prepared, splits, task.inputs["finetune"].path / "model", settings.precision, task.progress)
    scored = scoring.splits[settings.split]
    kept = prepared.read_split(settings.split, [f"column:{name}" for name in settings.slices])
    evaluation = measure(
        columns,
        scored,
        scoring.splits.get("validation"),
        {name: kept[f"column:{name}"].to_pylist() for name in settings.slices},
        split=settings.split,
        baseline=_baseline(task, prepared) if settings.baseline else {},
        texts_per_second=scoring.texts_per_second,
        precision=scoring.precision,
        without_pretraining=_scored_without(task, prepared),
    )
    _write(task, prepared, scored, evaluation)
    _write_reference(task, prepared, scoring, evaluation)
    _tell(task, columns, evaluation)
    _hold_to_gate(task, columns, evaluation)
    return evaluation.flat()


def _check(settings: EvaluateSettings, prepared: Prepared) -> None:
    """Refuses what cannot be done before anything is."""
    for name in settings.gate:
        check_metric("evaluate.gate", name, prepared.index.labels)
    if missing := [name for name in settings.slices if name not in prepared.index.columns]:
        kept = ", ".join(prepared.index.columns) or "none"
        raise InputError(f"evaluate.slices: {missing[0]!r} is not among the columns kept by data.columns ({kept}).")
    if not _rows(prepared, settings.split):
        other = "prepare.test_share" if settings.split == "test" else "prepare.validation_share"
        raise InputError(f"evaluate.split: the {settings.split} split has no rows; raise {other} or choose another.")


def _rows(prepared: Prepared, split: str) -> int:
    found = prepared.index.splits.get(split)
    return found.rows if found else 0


def _scored_without(task: Task, prepared: Prepared) -> Scored | None:
    if WITHOUT_PRETRAINING not in task.inputs:
        return None
    settings: EvaluateSettings = task.settings
    model = task.inputs[WITHOUT_PRETRAINING].path / "model"
    return score(prepared, [settings.split], model, settings.precision, task.progress).splits[settings.split]


def _baseline(task: Task, prepared: Prepared) -> dict[str, dict[str, float]]:
    with task.progress.step("baseline (TF-IDF, linear)", None):
        return measure_baseline(prepared, task.settings.split)


def _write(task: Task, prepared: Prepared, scored: Scored, evaluation: Evaluation) -> None:
    columns = prepared.index.labels
    gate = {
        name: {"minimum": minimum, "value": metric_of(evaluation.plain(), name, columns)}
        for name, minimum in task.settings.gate.items()
    }
    calibration = {name: column.temperature for name, column in evaluation.columns.items()}
    abstention = {
        name: [asdict(each) for each in column.abstaining]
        for name, column in evaluation.columns.items()
        if column.abstaining
    }
    with telling_storage_errors(str(task.out)):
        task.out.mkdir(parents=True, exist_ok=True)
        write_whole(task.out / "metrics.json", json.dumps({**evaluation.document(), "gate": gate}, indent=2))
        write_whole(task.out / "calibration.json", json.dumps(calibration, indent=2, ensure_ascii=False))
        write_whole(task.out / "abstention.json", json.dumps(abstention, indent=2, ensure_ascii=False))
        predictions = pa.table(
            {
                "row": scored.rows,
                **{f"label:{c.name}": pa.array(class_names(scored.labels[c.name], c)) for c in columns},
                **prediction_columns(columns, scored.logits, calibration, every_class=True),
            }
        )
        with task.out.fs.open((task.out / "predictions.parquet").path, "wb") as file:
            pq.write_table(predictions, file)
    texts = prepared.read_split(task.settings.split, ["text"])["text"]
    write_report(task, columns, scored, texts, evaluation)
    write_model_card(task, prepared.index, evaluation)


def _write_reference(task: Task, prepared: Prepared, scoring: Scoring, evaluation: Evaluation) -> None:
    split = "validation" if "validation" in scoring.splits else evaluation.split
    reference = measure_reference(
        prepared,
        split,
        scoring.splits[split].logits,
        {name: column.temperature for name, column in evaluation.columns.items()},
        task.inputs["finetune"].path / "model",
    )
    with telling_storage_errors(str(task.out)):
        write_whole(task.out / "reference.json", reference.model_dump_json(indent=2))


def _tell(task: Task, columns: tuple[LabelColumn, ...], evaluation: Evaluation) -> None:
    for column in columns:
        found, compared = evaluation.columns[column.name], evaluation.compared(column.name)
        rows: list[tuple[str, ...]] = [
            (name, f"{value:.4f}", *(f"{each[name]:.4f}" if name in each else "" for each in compared.values()))
            for name, value in found.metrics.items()
            if name not in ("log_loss", "ece")
        ]
        if found.metrics:
            was = f"was {found.metrics['ece']:.4f}"
            rows.append(("calibration error", f"{found.calibrated_ece:.4f}", was, *[""] * max(len(compared) - 1, 0)))
        title = f"{column.name}, {evaluation.split} split, {found.labelled:,} texts"
        task.progress.table(title, rows, ("", "classifier", *(compared or [""])))
    task.progress.tell(f"report: {task.out / 'report.html'}")


def _hold_to_gate(task: Task, columns: tuple[LabelColumn, ...], evaluation: Evaluation) -> None:
    measured = evaluation.plain()
    values = {name: metric_of(measured, name, columns) for name in task.settings.gate}
    short = [
        f"{name} is {values[name]:.4f}, less than {minimum:g}"
        for name, minimum in task.settings.gate.items()
        if values[name] < minimum
    ]
    if short:
        raise GateError(
            f"the gate is not met on the {evaluation.split} split: {'; '.join(short)}. See {task.out / 'report.html'}."
        )
