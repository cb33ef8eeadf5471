"""The evaluation's report: tables and pictures of each label column, and the mistakes worth reading."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from models.labels import LabelColumn, spans
from pipelines import figures
from pipelines.evaluating.calibration import probabilities
from pipelines.evaluating.measuring import SMALL_SLICE, ColumnEvaluation, Evaluation
from pipelines.evaluating.scoring import Scored
from pipelines.metrics import decide, labelled
from pipelines.report import Cell, Figure, Section, Table, Text, render
from pipelines.stage import Task

_MISTAKES = 20
_TEXT_SHOWN = 400
_CLASSES_DRAWN = 80


def write_report(
    task: Task, columns: Sequence[LabelColumn], scored: Scored, texts: pa.ChunkedArray, evaluation: Evaluation
) -> None:
    """Writes `report.html` into `task.out`."""
    sections: list[Section] = []
    for column, span in spans(columns):
        found = evaluation.columns[column.name]
        prefix = f"{column.name}: " if len(columns) > 1 else ""
        if not found.metrics:
            sections.append(Section(f"{prefix}no labels", [Text("No row of this split has a label in this column.")]))
            continue
        sections.append(Section(f"{prefix}metrics", _metrics_blocks(found, evaluation.compared(column.name))))
        sections.append(Section(f"{prefix}classes", _class_blocks(column, found)))
        if found.matrix is not None and len(column.classes) <= _CLASSES_DRAWN:
            caption = "Each row is a label, shaded by the share of its texts; the numbers are texts."
            picture = Figure(figures.confusion_matrix(found.matrix, column.classes), caption)
            sections.append(Section(f"{prefix}confusion", [picture]))
        sections.append(Section(f"{prefix}calibration", _calibration_blocks(found, evaluation)))
        if found.abstaining:
            sections.append(Section(f"{prefix}abstention", [_abstention_table(found)]))
        if found.slices:
            sections.append(Section(f"{prefix}slices", _slice_tables(found)))
        mistakes = _mistakes(column, scored, scored.logits[:, span], texts, found.temperature)
        sections.append(Section(f"{prefix}most confident mistakes", [mistakes]))
    first = evaluation.columns[columns[0].name].metrics
    facts = [(name.replace("_", " "), f"{first[name]:.3f}") for name in list(first)[:2]] if len(columns) == 1 else []
    facts += [("texts", f"{evaluation.rows:,}"), ("texts/s", f"{evaluation.texts_per_second:,.0f}")]
    note = f"The {evaluation.split} split, computed in {evaluation.precision}. Artifact {task.out.name}."
    render(task.out / "report.html", f"Evaluation of {task.recipe or 'a classifier'}", sections, facts=facts, note=note)


def _metrics_blocks(found: ColumnEvaluation, compared: dict[str, dict[str, float]]) -> list[Table | Text]:
    rows: list[list[Cell]] = [
        [name.replace("_", " "), value, found.calibrated.get(name), *(each.get(name) for each in compared.values())]
        for name, value in found.metrics.items()
    ]
    caption = f"Of {found.labelled:,} labelled texts. The baseline is TF-IDF with a linear support vector machine."
    blocks: list[Table | Text] = [
        Table(("metric", "classifier", "with temperature", *compared), rows, caption, digits=4)
    ]
    if "without pretraining" in compared:
        blocks.append(
            Text(
                "Without pretraining: the same fine-tuning, of as many texts in the same order, of the encoder as it "
                "was before the recipe's own pretraining."
            )
        )
    return blocks


def _class_blocks(column: LabelColumn, found: ColumnEvaluation) -> list[Table | Figure]:
    scores = found.scores
    order = np.argsort(-scores.support, kind="stable")
    rows: list[list[Cell]] = [
        [
            column.classes[i],
            *(float(x[i]) for x in (scores.precision, scores.recall, scores.f1)),
            int(scores.support[i]),
        ]
        for i in order
    ]
    table = Table(("class", "precision", "recall", "F1", "texts"), rows)
    if len(rows) > _CLASSES_DRAWN:
        return [table]
    bars = {column.classes[i]: [float(scores.precision[i]), float(scores.recall[i])] for i in order}
    return [Figure(figures.bars(bars, "share", ("precision", "recall"))), table]


def _calibration_blocks(found: ColumnEvaluation, evaluation: Evaluation) -> list[Text | Figure]:
    if evaluation.calibrated_on:
        told = (
            f"Logits are divided by {found.temperature:.3f}, fitted on {evaluation.calibrated_on:,} validation texts: "
            f"the expected calibration error goes from {found.metrics['ece']:.4f} to {found.calibrated_ece:.4f}."
        )
        if evaluation.split == "validation":
            told += " This is the split they were fitted on, so the second number is optimistic."
    else:
        told = "There is no validation split to fit a temperature on, so the probabilities are as trained."
    caption = "On the diagonal, probabilities are frequencies; below it, the classifier is too sure of itself."
    after = found.calibrated_reliability if evaluation.calibrated_on else None
    return [Text(told), Figure(figures.reliability_diagram(found.reliability, after), caption)]


def _abstention_table(found: ColumnEvaluation) -> Table:
    rows: list[list[Cell]] = [
        [each.below, each.answered, each.accuracy] for each in found.abstaining if round(each.below * 100) % 10 == 0
    ]
    caption = (
        "What comes of giving no answer where the calibrated probability is lower (`serve.abstain`), on the validation "
        "split."
    )
    return Table(("no answer below", "texts answered", "accuracy of the answers"), rows, caption)


def _slice_tables(found: ColumnEvaluation) -> list[Table]:
    tables = []
    for name in dict.fromkeys(one.column for one in found.slices):
        own = [one for one in found.slices if one.column == name]
        metrics = list(own[0].metrics)
        rows: list[list[Cell]] = [
            [f"{one.value} (few)" if one.small else one.value, one.rows, *one.metrics.values()] for one in own
        ]
        caption = f"By {name}. (few): fewer than {SMALL_SLICE} texts, so the numbers say little."
        tables.append(Table((name, "texts", *(metric.replace("_", " ") for metric in metrics)), rows, caption))
    return tables


def _mistakes(
    column: LabelColumn, scored: Scored, logits: np.ndarray, texts: pa.ChunkedArray, temperature: float
) -> Table | Text:
    """The wrong decisions with the highest probability, as far as they fit."""
    labels = scored.labels[column.name]
    probability = probabilities(logits, column.multi, temperature)
    decided = decide(logits, column.multi)
    if column.multi:
        sure = np.where((decided != labels) & (labels >= 0), np.abs(probability - 0.5), -1.0)
        which = [divmod(int(flat), sure.shape[1]) for flat in np.argsort(-sure, axis=None, kind="stable")[:_MISTAKES]]
        which = [(row, index) for row, index in which if sure[row, index] >= 0]
        told = [("yes" if labels[r, i] else "no", column.classes[i], float(probability[r, i])) for r, i in which]
        header = ("text", "row", "holds", "class", "its probability")
    else:
        wrong = np.flatnonzero(labelled(labels) & (decided != labels))
        order = wrong[np.argsort(-probability[wrong, decided[wrong]], kind="stable")[:_MISTAKES]]
        which = [(int(row), int(decided[row])) for row in order]
        told = [(column.classes[labels[r]], column.classes[i], float(probability[r, i])) for r, i in which]
        header = ("text", "row", "label", "predicted", "probability")
    if not which:
        return Text("There are none.")
    rows: list[list[Cell]] = [
        [_cut(texts[row].as_py()), str(scored.rows[row]), *cells] for (row, _), cells in zip(which, told, strict=True)
    ]
    return Table(header, rows, "Often it is the label that is wrong: read them.")


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_SHOWN else text[:_TEXT_SHOWN] + "…"
