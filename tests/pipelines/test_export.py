"""export takes what loses little, tells what it refuses, and leaves what serving and a reader need."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from upath import UPath

from models.heads import remove_heads
from models.labels import LabelColumn
from models.onnx_engine import load_onnx_engine
from models.settings import InputError
from models.torch_engine import load_torch_engine
from pipelines import export
from pipelines.export import ExportSettings
from pipelines.exporting.head_pruning import export_without_heads
from pipelines.prepared import Prepared
from pipelines.progress import Progress
from pipelines.stage import Task
from tests.pipelines.tiny import MOOD, TOPIC, artifact, make_classifier, make_prepared

LABELS = (TOPIC, MOOD)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetuned")
    make_classifier(folder / "model", LABELS)
    return folder


def task(finetuned: Path, tmp_path: Path, labels: tuple[LabelColumn, ...] = LABELS, **settings: Any) -> Task:
    prepared = make_prepared(tmp_path / "prepared", labels)
    evaluated = tmp_path / "evaluated"
    evaluated.mkdir()
    (evaluated / "calibration.json").write_text(json.dumps({"topic": 2.0, "mood": 1.0}))
    folders = {"prepare": prepared, "finetune": finetuned, "evaluate": evaluated}
    inputs = {name: artifact(folder, name) for name, folder in folders.items()}
    return Task(ExportSettings(precision="fp32", **settings), inputs, UPath(tmp_path / "out"), Progress(), "toy")


def test_int8_is_taken_where_it_loses_little(finetuned: Path, tmp_path: Path) -> None:
    todo = task(finetuned, tmp_path)
    metrics = export.run(todo)
    assert metrics["engine"] == "onnx int8"
    assert metrics["agreement"] >= 0.97
    document = json.loads((todo.out / "export.json").read_text())
    assert [f"{each['engine']} {each['precision']}" for each in document["compared"]] == [
        "torch fp32",
        "onnx int8",
        "onnx fp32",
    ]
    assert document["refused"] == {}
    # What it says of agreement is what the files answer.
    rows = Prepared(UPath(tmp_path / "prepared")).read_split("validation", ["text"])["text"].to_pylist()
    ours = load_onnx_engine(Path(todo.out / "onnx"))
    theirs = load_torch_engine(finetuned / "model", precision="fp32")
    labels = [[{n: p.label for n, p in each.labels.items()} for each in e.classify(rows)] for e in (ours, theirs)]
    same = np.mean([ours == theirs for ours, theirs in zip(*labels, strict=True)])
    assert metrics["agreement"] == pytest.approx(same)
    assert "onnx int8" in (todo.out / "report.html").read_text()


def test_what_loses_more_than_allowed_is_refused_and_told(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = task(finetuned, tmp_path)
    with mock.patch.object(export, "_problem", side_effect=["it decides 90% as torch does", ""]):
        assert export.run(todo)["engine"] == "onnx fp32"
    told = capsys.readouterr().err
    assert "onnx int8 is refused: it decides 90% as torch does; onnx fp32 is taken." in told
    assert load_onnx_engine(Path(todo.out / "onnx")).precision == "fp32"


def test_the_limits_decide() -> None:
    reference = export.Compared("torch", "fp32", 1.0, 0.0, {"topic": 0.9, "mood": 0.8}, 1, 1.0)
    candidate = export.Compared("onnx", "int8", 0.98, 0.1, {"topic": 0.91, "mood": 0.77}, 1, 2.0)
    settings = ExportSettings(min_agreement=0.99)
    assert "98.00% of the validation texts" in export._problem(candidate, reference, settings)
    settings = ExportSettings(max_macro_f1_loss=0.02)
    assert "loses 0.0300 macro-F1, more than export.max_macro_f1_loss, 0.02" in export._problem(
        candidate, reference, settings
    )
    assert export._problem(candidate, reference, ExportSettings(max_macro_f1_loss=0.04)) == ""


def test_a_classifier_that_cannot_be_exported_stays_in_torch(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = task(finetuned, tmp_path)
    (todo.out / "onnx").mkdir(parents=True)  # Of a try that was killed.
    with mock.patch.object(export, "export_onnx", side_effect=InputError("the classifier cannot be written as ONNX.")):
        metrics = export.run(todo)
    assert metrics["engine"] == "torch fp32"
    assert not (todo.out / "onnx").exists()
    refused = json.loads((todo.out / "export.json").read_text())["refused"]
    assert refused == dict.fromkeys(("onnx int8", "onnx fp32"), "the classifier cannot be written as ONNX")
    assert (
        "onnx int8 is refused: the classifier cannot be written as ONNX; torch fp32 is taken" in capsys.readouterr().err
    )


def test_fewer_heads_are_one_more_export(finetuned: Path, tmp_path: Path) -> None:
    """The toy classifier has one layer of two heads; without one of them it is smaller, and says other things."""
    todo = task(finetuned, tmp_path, prune_heads=0.5, weights="fp32", min_agreement=0.0, max_macro_f1_loss=1.0)
    assert export.run(todo)["engine"] == "onnx fp32, 50% of heads removed"
    document = json.loads((todo.out / "export.json").read_text())
    pruned, whole = document["compared"][1:]
    assert pruned["note"] == "50% of heads removed"
    assert "note" not in whole
    assert pruned["bytes"] < whole["bytes"]
    assert pruned["difference"] > 100 * whole["difference"]
    taken = load_onnx_engine(Path(todo.out / "onnx"))
    reference = load_torch_engine(finetuned / "model", precision="fp32")
    encoded = reference.encode(["the very good cat", "a bad saw"])
    told = taken.logits(encoded)
    assert np.abs(told - reference.logits(encoded)).max() > 0.1
    apart = []
    for head in range(2):
        without = load_torch_engine(finetuned / "model", precision="fp32")
        remove_heads(without.model, [[head]])
        apart.append(np.abs(told - without.logits(encoded)).max())
    assert min(apart) < 2e-5


def test_heads_that_cannot_be_removed_are_told_and_the_rest_is_exported(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = task(finetuned, tmp_path, prune_heads=0.5, weights="fp32")
    error = InputError("heads of distilbert models cannot be removed, only those of bert.")
    with mock.patch.object(export, "export_without_heads", side_effect=error):
        assert export.run(todo)["engine"] == "onnx fp32"
    assert (
        "onnx fp32, 50% of heads removed is refused: heads of distilbert models cannot be removed"
        in capsys.readouterr().err
    )


def test_heads_cannot_be_judged_without_labels(finetuned: Path, tmp_path: Path) -> None:
    prepared = Prepared(UPath(make_prepared(tmp_path / "prepared", (TOPIC,), missing=1.0)))
    make_classifier(tmp_path / "model", (TOPIC,), steps=1)
    with pytest.raises(InputError, match="of the first 512 training texts none has a label"):
        export_without_heads(tmp_path / "model", {"fp32": tmp_path / "out"}, prepared, 0.5)
