"""The model card: what someone who uses the classifier should know, in Markdown."""

import json
from typing import Any

from jinja2 import Environment

from cluster.store import telling_storage_errors, write_whole
from pipelines.evaluating.measuring import SMALL_SLICE, Evaluation
from pipelines.prepared import Index
from pipelines.report import templates
from pipelines.stage import Task

_WEAKEST = 3


def write_model_card(task: Task, index: Index, evaluation: Evaluation) -> None:
    """Writes `model_card.md` into `task.out`."""
    prepare, finetune = task.inputs["prepare"], task.inputs["finetune"]
    columns = [_column(index, evaluation, name) for name in evaluation.columns]
    model = f"finetune/{finetune.path.name}/model"
    cleaning = prepare.record.settings.get("prepare") or {}
    card = (
        _environment()
        .get_template("model_card.md.j2")
        .render(
            name=task.recipe or "classifier",
            columns=columns,
            several=len(columns) > 1,
            any_multi=any(column.multi for column in index.labels),
            few=[row["name"] for column in columns for row in column["rows"] if row["support"] < SMALL_SLICE],
            small=SMALL_SLICE,
            split=evaluation.split,
            split_rows=evaluation.rows,
            truncated=index.splits[evaluation.split].truncated,
            splits={name: split.rows for name, split in index.splits.items()},
            deduplicated=cleaning.get("deduplicate", "none") != "none",
            pair=index.pair,
            max_length=index.max_length,
            calibrated_on=evaluation.calibrated_on,
            data_settings=json.dumps(prepare.record.settings, indent=2, ensure_ascii=False),
            training_settings=json.dumps(finetune.record.settings, indent=2, ensure_ascii=False),
            lineage={
                "evaluate": task.out.name,
                "finetune": finetune.record.fingerprint,
                "prepare": prepare.record.fingerprint,
                **{f"prepare, {name}": value for name, value in prepare.record.inputs.items()},
                **{f"finetune, {name}": value for name, value in finetune.record.inputs.items() if name != "prepare"},
            },
            versions=finetune.record.versions,
            model=model,
            calibration=f"evaluate/{task.out.name}/calibration.json",
            temperature={name: round(found.temperature, 4) for name, found in evaluation.columns.items()},
        )
    )
    with telling_storage_errors(str(task.out)):
        write_whole(task.out / "model_card.md", card)


def _column(index: Index, evaluation: Evaluation, name: str) -> dict[str, Any]:
    found = evaluation.columns[name]
    column = next(column for column in index.labels if column.name == name)
    scores = found.scores
    numbers = zip(column.classes, scores.precision, scores.recall, scores.f1, scores.support, strict=True)
    rows = [dict(zip(("name", "precision", "recall", "f1", "support"), row, strict=True)) for row in numbers]
    measured = sorted((row for row in rows if row["support"] >= SMALL_SLICE), key=lambda row: float(row["f1"]))
    return {
        "name": name,
        "multi": column.multi,
        "classes": column.classes,
        "labelled": found.labelled,
        "metrics": found.metrics,
        "calibrated": found.calibrated,
        "temperature": found.temperature,
        "baseline": evaluation.baseline.get(name, {}),
        "rows": rows,
        "weakest": [row["name"] for row in measured[:_WEAKEST]] if len(measured) > 2 * _WEAKEST else [],
        "slices": found.slices,
    }


def _environment() -> Environment:
    environment = templates(html=False)
    environment.filters["cell"] = _cell
    return environment


def _cell(value: object) -> str:
    """Text that cannot break out of a Markdown table's cell or start markup."""
    text = " ".join(str(value).split())
    return "".join("\\" + mark if mark in "\\|`*_[]<>" else mark for mark in text)
