"""Artifacts of a small classifier as the stages would leave them, without running any."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cluster.store import Artifact, Record, Store
from models.drift import make_reference
from tests.small_classifiers import SENTIMENT, make_classifier

PRINTS = {"prepare": "p" * 16, "finetune": "f" * 16, "evaluate": "e" * 16, "export": "x" * 16}


def _reference() -> str:
    said, sure = {"sentiment": np.array([0, 1, 2])}, {"sentiment": np.array([0.5, 0.7, 0.9])}
    return make_reference((SENTIMENT,), said, sure, np.array([3, 5, 8]), 1, "validation").model_dump_json()


def put_artifacts(store: Store, prints: Mapping[str, str] = PRINTS, *, onnx: bool = False) -> dict[str, Artifact]:
    """The artifacts, with these fingerprints by stage; those that are there already stay.

    With `onnx` the export holds, of files that none could load; without, it was refused.
    """
    inputs = {
        "prepare": {"data": "d" * 32},
        "finetune": {"prepare": prints["prepare"], "encoder": "c" * 32},
        "evaluate": {"prepare": prints["prepare"], "finetune": prints["finetune"]},
        "export": {each: prints[each] for each in ("prepare", "finetune", "evaluate")},
    }
    metrics = {
        "prepare": {"rows_in": 160},
        "finetune": {"steps": 9},
        "evaluate": {"accuracy": 0.875, "macro_f1": 0.8125, "baseline.accuracy": 0.5, "rows": 20},
        "export": {"engine": "onnx int8" if onnx else "torch bf16", "agreement": 0.99, "speedup": 2.0},
    }
    made = {}
    for stage, fingerprint in prints.items():
        if found := store.find(stage, fingerprint):
            made[stage] = found
            continue
        folder = Path(store.folder(stage, fingerprint).path)
        folder.mkdir(parents=True)
        if stage == "finetune":
            make_classifier(folder / "model")
        if stage == "evaluate":
            (folder / "calibration.json").write_text(json.dumps({"sentiment": 2.0}))
            curve = [{"below": 0.0, "answered": 1.0, "accuracy": 0.8}, {"below": 0.5, "answered": 0.5, "accuracy": 0.9}]
            (folder / "abstention.json").write_text(json.dumps({"sentiment": curve}))
            (folder / "reference.json").write_text(_reference())
        if stage == "export":
            refused = {} if onnx else {"onnx int8": "it loses 0.2 macro-F1"}
            (folder / "export.json").write_text(json.dumps({"refused": refused}))
        if stage == "export" and onnx:
            (folder / "onnx").mkdir()
            for name in ("onnx.json", "model.onnx"):
                (folder / "onnx" / name).write_text(name)
        record = Record(stage, fingerprint, {}, inputs[stage], {"torch": "2"}, metrics[stage], "small")
        made[stage] = store.commit(record)
    return made
