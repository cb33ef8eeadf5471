"""export: the fine-tuned classifier as ONNX, with fused kernels and int8 weights, for replicas without a GPU.

It is held against torch on the validation split before it is taken: where it loses more than the recipe allows, the
next best is taken in its place (with all heads, float32 in ONNX, then torch), and that is told. Writes into its
artifact

    onnx/           the export, as `models.onnx_engine` reads it; absent where torch stays
    export.json     which engine was taken, what was refused and why, all that was measured
    report.html     the same as a table
"""

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from cluster.store import local_copy, remove_tree, telling_storage_errors, upload_tree, write_whole
from models.onnx_engine import OnnxPrecision, load_onnx_engine
from models.onnx_export import export_onnx
from models.settings import InputError, Precision, Settings, added
from models.torch_engine import load_torch_engine
from pipelines.evaluating.scoring import encode_rows, encoded_columns, label_arrays
from pipelines.exporting.comparing import Compared, compare, engine_name, folder_bytes
from pipelines.exporting.head_pruning import export_without_heads
from pipelines.prepared import Prepared
from pipelines.report import Section, Table, Text, render
from pipelines.stage import Task

NAME = "export"
FORMAT = 1

ONNX = "onnx"
"""The export's folder in the artifact."""

_HEADER = ("engine", "agreement", "largest difference", "macro-F1", "MB", "texts/s", "")


class ExportSettings(Settings):
    """How the classifier is exported, and what the export may lose."""

    weights: Literal["int8", "fp32"] = Field(
        "int8", description="int8 is a quarter of the size and about twice as fast on a CPU; fp32 loses nothing."
    )
    min_agreement: float = Field(
        0.97, ge=0, le=1, description="The share of validation texts that must be decided as torch decides them."
    )
    max_macro_f1_loss: float = Field(0.01, ge=0, le=1, description="Macro-F1 that may be lost, in any label column.")
    max_texts: int = Field(5_000, ge=1, description="Validation texts to compare on at most.")
    precision: Precision = Field("bf16", description="Of the torch engine that it is compared with.")
    prune_heads: float = added(
        0.0,
        ge=0,
        lt=1,
        description="Share of the attention heads to remove, the least important ones, from BERT and its kin; compared "
        "as one more export, beside that with all heads.",
    )


def externals(settings: ExportSettings) -> dict[str, str]:
    """Nothing outside the store."""
    return {}


def run(task: Task) -> dict[str, Any]:
    """Exports into `task.out`; a classifier that cannot be exported, or loses too much, stays in torch."""
    settings: ExportSettings = task.settings
    prepared = Prepared(task.inputs["prepare"].path)
    temperature = json.loads((task.inputs["evaluate"].path / "calibration.json").read_text(encoding="utf-8"))
    threads = torch.get_num_threads()
    with local_copy(task.inputs["finetune"].path / "model") as model, tempfile.TemporaryDirectory() as scratch:
        exported, refused = _export(task, prepared, model, Path(scratch))
        try:
            found = _compare(task, prepared, model, exported, temperature)
        finally:
            torch.set_num_threads(threads)
        reference = found[0]
        for candidate in found[1:]:
            if problem := _problem(candidate, reference, settings):
                refused[candidate.name] = problem
        # What is wanted most comes first.
        taken = next((each for each in found[1:] if each.name not in refused), reference)
        with telling_storage_errors(str(task.out)):
            task.out.mkdir(parents=True, exist_ok=True)
            remove_tree(task.out / ONNX)
            if taken is not reference:
                upload_tree(next(each.folder for each in exported if each.name == taken.name), task.out / ONNX)
            _write(task, found, taken, refused)
    _tell(task, found, taken, refused)
    return {
        "engine": taken.name,
        "agreement": taken.agreement,
        "macro_f1_loss": taken.macro_f1_loss(reference),
        "texts_per_second": round(taken.texts_per_second, 1),
        "speedup": round(taken.texts_per_second / reference.texts_per_second, 2),
    }


@dataclass(frozen=True)
class _Export:
    """A classifier in ONNX, not yet compared."""

    precision: OnnxPrecision
    folder: Path
    note: str = ""

    @property
    def name(self) -> str:
        """As tables show it."""
        return engine_name(ONNX, self.precision, self.note)


def _export(task: Task, prepared: Prepared, model: Path, scratch: Path) -> tuple[list[_Export], dict[str, str]]:
    """The exports, what is wanted most first; why there is none, by the engine's name."""
    settings: ExportSettings = task.settings
    wanted: tuple[OnnxPrecision, ...] = ("int8", "fp32") if settings.weights == "int8" else ("fp32",)
    whole = [_Export(precision, scratch / precision) for precision in wanted]
    exported: list[_Export] = []
    refused: dict[str, str] = {}
    if settings.prune_heads:
        pruned = _Export(wanted[0], scratch / "pruned", f"{settings.prune_heads:.0%} of heads removed")
        with task.progress.step("export without some heads"):
            try:
                export_without_heads(model, {pruned.precision: pruned.folder}, prepared, settings.prune_heads)
                exported.append(pruned)
            except InputError as error:
                refused[pruned.name] = str(error).rstrip(".")
    with task.progress.step(f"export {' and '.join(wanted)}"):
        try:
            export_onnx(model, {each.precision: each.folder for each in whole})
            exported += whole
        except InputError as error:
            refused |= dict.fromkeys((each.name for each in whole), str(error).rstrip("."))
    return exported, refused


def _compare(
    task: Task, prepared: Prepared, model: Path, exported: list[_Export], temperature: dict[str, float]
) -> list[Compared]:
    columns = prepared.index.labels
    wanted = [*encoded_columns(prepared), *(f"label:{column.name}" for column in columns)]
    rows = prepared.read_split("validation", wanted)
    rows = rows.slice(0, task.settings.max_texts)  # The order is a shuffled one.
    engines = [
        load_torch_engine(model, precision=task.settings.precision, threads=1, temperature=temperature),
        *(load_onnx_engine(each.folder, temperature=temperature) for each in exported),
    ]
    sizes = [
        folder_bytes(model, [".safetensors"]),
        *(folder_bytes(each.folder, [".onnx", ".onnx.data"]) for each in exported),
    ]
    with task.progress.step(f"compare on {rows.num_rows:,} texts"):
        found = compare(engines, sizes, encode_rows(rows), label_arrays(rows, columns), columns)
    notes = ["", *(each.note for each in exported)]
    return [replace(each, note=note) for each, note in zip(found, notes, strict=True)]


def _problem(candidate: Compared, reference: Compared, settings: ExportSettings) -> str:
    """Why the export is not taken; empty where it is."""
    if candidate.agreement < settings.min_agreement:
        return (
            f"it decides {candidate.agreement:.2%} of the validation texts as torch does, less than "
            f"export.min_agreement, {settings.min_agreement:g}"
        )
    if (loss := candidate.macro_f1_loss(reference)) > settings.max_macro_f1_loss:
        return f"it loses {loss:.4f} macro-F1, more than export.max_macro_f1_loss, {settings.max_macro_f1_loss:g}"
    return ""


def _rows(found: list[Compared], taken: Compared, refused: dict[str, str]) -> list[tuple[str, ...]]:
    return [
        (
            each.name,
            f"{each.agreement:.2%}",
            f"{each.difference:.4f}",
            ", ".join(f"{value:.4f}" for value in each.macro_f1.values()),
            f"{each.bytes / 1e6:,.1f}",
            f"{each.texts_per_second:,.0f}",
            "taken" if each is taken else "refused" if each.name in refused else "",
        )
        for each in found
    ]


def _tell(task: Task, found: list[Compared], taken: Compared, refused: dict[str, str]) -> None:
    task.progress.table("beside torch, one text at a time on one core", _rows(found, taken, refused), _HEADER)
    for name, problem in refused.items():
        task.progress.tell(f"{name} is refused: {problem}; {taken.name} is taken.", "yellow")
    task.progress.tell(f"report: {task.out / 'report.html'}")


def _write(task: Task, found: list[Compared], taken: Compared, refused: dict[str, str]) -> None:
    compared = [{name: value for name, value in asdict(each).items() if name != "note" or value} for each in found]
    document = {"engine": taken.name, "refused": refused, "compared": compared}
    write_whole(task.out / "export.json", json.dumps(document, indent=2, ensure_ascii=False))
    caption = (
        "Agreement is the share of validation texts that are decided as torch decides them; the largest difference is "
        "that of any calibrated probability. Texts/s are of one text at a time on one core of the machine that "
        "exported."
    )
    blocks: list[Table | Text] = [Table(_HEADER, _rows(found, taken, refused), caption)]
    blocks += [Text(f"{name} is refused: {problem}.") for name, problem in refused.items()]
    facts = [("engine", taken.name), ("agreement", f"{taken.agreement:.2%}")]
    title = f"Export of {task.recipe or 'a classifier'}"
    note = f"Artifact {task.out.name}."
    render(task.out / "report.html", title, [Section("Engines", blocks)], facts=facts, note=note)
