"""What an endpoint is given of the recipe's artifacts."""

import json
from pathlib import Path

import pytest
from upath import UPath

from cluster.store import Artifact, Record
from recipes import endpoint
from recipes.recipe import Recipe
from serve.model import ServedModel
from serve.settings import ServeSettings


def test_the_evaluation_gives_temperature_and_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "calibration.json").write_text(json.dumps({"topic": 2.0}))
    (tmp_path / "reference.json").write_text(json.dumps({"split": "validation"}))
    served: list[ServedModel] = []

    def serve_model(_: ServeSettings, model: ServedModel) -> str:
        served.append(model)
        return "http://here"

    monkeypatch.setattr(endpoint, "serve_model", serve_model)
    record = Record("evaluate", "e" * 16, {}, {}, {}, {"accuracy": 0.9})
    artifacts = {name: Artifact(UPath(tmp_path), record) for name in ("finetune", "evaluate")}
    recipe = Recipe.model_validate(
        {
            "name": "tickets",
            "data": {"source": "a.csv", "text": "body", "labels": "topic"},
            "finetune": {"encoder": "x"},
        }
    )
    assert endpoint.deploy(recipe, artifacts) == "http://here"
    (model,) = served
    assert (model.temperature, model.reference) == ({"topic": 2.0}, {"split": "validation"})
