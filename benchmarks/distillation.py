"""Distillation: half of MiniLM's layers, fine-tuned by itself and taught by the whole; tweets to airlines.

    python benchmarks/distillation.py                                  # all tweets
    python benchmarks/distillation.py --airlines "united|americanair"  # those to two airlines: half an hour

One teacher, MiniLM with its 6 layers, fine-tuned as the airline recipe says. For each seed a student of 3 layers on the
labels alone and one that the teacher teaches, with the same rows, steps and rates. Macro-F1 and accuracy on the test
split, on which nothing is chosen; texts/s of one text at a time on one core, in torch and as int8 in ONNX Runtime.
Then the teacher exported as int8 with shares of its attention heads removed, as export compares it, on the validation
split.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from machine import describe_machine
from rich.console import Console
from rich.table import Table

from cluster.connect import connected
from cluster.store import Artifact, Store
from models.onnx_engine import load_onnx_engine
from models.onnx_export import export_onnx
from models.torch_engine import load_torch_engine
from pipelines.evaluating.scoring import encode_rows, encoded_columns, label_arrays
from pipelines.exporting.comparing import compare, folder_bytes
from pipelines.prepared import Prepared
from pipelines.progress import Progress
from pipelines.stage import complete
from recipes.loading import load_recipe
from recipes.planning import plan

RECIPE = Path(__file__).parent.parent / "recipes" / "airline.yaml"
SHARES = (0.1, 0.2, 0.4)
TEACHER, ALONE, TAUGHT = "6 layers, the teacher", "3 layers, labels alone", "3 layers, taught"


def speeds(prepared: Prepared, models: list[Path], scratch: Path) -> list[tuple[float, float, int]]:
    """Of each classifier: texts/s in torch, texts/s in ONNX Runtime, and the bytes of the latter."""
    columns = prepared.index.labels
    rows = prepared.read_split("test", [*encoded_columns(prepared), *(f"label:{each.name}" for each in columns)])
    exported = [scratch / str(number) for number in range(len(models))]
    for model, out in zip(models, exported, strict=True):
        export_onnx(model, {"int8": out})
    engines = [
        *(load_torch_engine(model, threads=1) for model in models),
        *(load_onnx_engine(out) for out in exported),
    ]
    sizes = [folder_bytes(out, [".onnx", ".onnx.data"]) for out in exported]
    compared = compare(engines, [0] * len(models) + sizes, encode_rows(rows), label_arrays(rows, columns), columns)
    found = [each.texts_per_second for each in compared]
    return list(zip(found[: len(models)], found[len(models) :], sizes, strict=True))


def without_heads(store: Store, progress: Progress, overrides: Sequence[str]) -> Table:
    """What the classifier's exports lose and gain by fewer heads; speed beside that with all heads, timed in turns."""
    table = Table("the teacher, exported", "agreement with torch", "macro-F1", "speed", "MB")
    for share in SHARES:
        # Nothing is refused, so that all is shown.
        export = f"export={{prune_heads: {share}, min_agreement: 0, max_macro_f1_loss: 1}}"
        path = complete(plan(load_recipe(RECIPE, [*overrides, export]))["export"], store, progress, "airline").path
        compared = json.loads((path / "export.json").read_text(encoding="utf-8"))["compared"]
        pruned, whole = (each for each in compared if each["precision"] == "int8")
        for each in (whole, pruned) if share == SHARES[0] else (pruned,):
            (macro_f1,), speed = each["macro_f1"].values(), each["texts_per_second"] / whole["texts_per_second"]
            name, agreement = f"int8, {each.get('note', 'all heads')}", f"{each['agreement']:.4f}"
            table.add_row(name, agreement, f"{macro_f1:.4f}", f"{speed:.2f}", f"{each['bytes'] / 1e6:.1f}")
    return table


def main() -> None:
    """One teacher, and for each seed two students."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--airlines", help="only tweets to these, as a regular expression")
    parser.add_argument("--epochs", type=int, default=8, help="of the students")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    console, progress = Console(), Progress(Console(stderr=True))
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch, connected("local"):
        store = Store.open(f"{scratch}/store")
        shared = ["evaluate={baseline: false}", "finetune.workers=1"]
        if given.airlines:
            shared.append(f"data.where.text=(?i)@({given.airlines})")

        def run(*overrides: str) -> tuple[Artifact, dict[str, float]]:
            stages = plan(load_recipe(RECIPE, [*shared, *overrides]))
            evaluated = complete(stages["evaluate"], store, progress, "airline")
            return complete(stages["finetune"], store, progress, "airline"), dict(evaluated.record.metrics)

        teacher, measured = run()
        prepared = Prepared(complete(plan(load_recipe(RECIPE, shared))["prepare"], store, progress, "airline").path)
        found = {TEACHER: [measured], ALONE: [], TAUGHT: []}
        student = ["finetune.keep_layers=3", f"finetune.epochs={given.epochs}"]
        for seed in range(given.seeds):
            alone, measured = run(*student, f"finetune.seed={seed}")
            found[ALONE].append(measured)
            taught, measured = run(*student, f"finetune.seed={seed}", f"finetune.teacher={teacher.path / 'model'}")
            found[TAUGHT].append(measured)
        models = [Path((each.path / "model").path) for each in (teacher, alone, taught)]
        measured_speeds = speeds(prepared, models, Path(scratch))
        pruned = without_heads(store, progress, shared)
        splits = {name: split.rows for name, split in prepared.index.splits.items()}
    table = Table(
        "MiniLM", "macro-F1", "accuracy", "each seed's macro-F1", "texts/s, torch", "texts/s, int8", "MB, int8"
    )
    for (name, runs), (torch_speed, onnx_speed, size) in zip(found.items(), measured_speeds, strict=True):
        means = (f"{statistics.fmean(run[key] for run in runs):.4f}" for key in ("macro_f1", "accuracy"))
        each = ", ".join(f"{run['macro_f1']:.3f}" for run in runs)
        table.add_row(name, *means, each, f"{torch_speed:,.0f}", f"{onnx_speed:,.0f}", f"{size / 1e6:.1f}")
    console.print(describe_machine())
    console.print(f"{splits['train']:,} tweets to learn from, {splits['test']:,} to test; means over seeds")
    console.print(table)
    console.print(pruned)


if __name__ == "__main__":
    main()
