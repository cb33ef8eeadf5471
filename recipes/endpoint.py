"""From a recipe's artifacts to a live endpoint, and asking it."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from upath import UPath

from cluster.store import Artifact, ClusterError
from models.onnx_engine import NOTES
from models.settings import InputError
from pipelines.evaluating.calibration import Abstaining, threshold_for
from pipelines.export import ONNX
from recipes.recipe import Recipe
from serve.app import serve_model
from serve.model import ServedModel

_TIMEOUT_S = 60


def calibration(evaluated: Artifact) -> dict[str, float]:
    """By label column, the temperature that `evaluate` found."""
    found: dict[str, float] = json.loads((evaluated.path / "calibration.json").read_text(encoding="utf-8"))
    return found


def reference(evaluated: Artifact) -> dict[str, Any]:
    """What texts and answers looked like in the evaluation, for telling drift."""
    found: dict[str, Any] = json.loads((evaluated.path / "reference.json").read_text(encoding="utf-8"))
    return found


def deploy(recipe: Recipe, artifacts: Mapping[str, Artifact]) -> str:
    """Serves the recipe's classifier; returns the endpoint's URL.

    Raises:
        ClusterError: it cannot be started.
        InputError: the recipe's address cannot work on this cluster.
    """
    tuned, evaluated = artifacts["finetune"], artifacts["evaluate"]
    card = {
        "metrics": evaluated.record.metrics,
        "lineage": {
            name: {"fingerprint": artifact.record.fingerprint, "inputs": artifact.record.inputs}
            for name, artifact in artifacts.items()
        },
        "versions": tuned.record.versions,
    }
    onnx, refused = _export(artifacts.get("export"))
    model = ServedModel(
        name=recipe.name,
        version=tuned.record.fingerprint,
        torch=tuned.path / "model",
        onnx=onnx,
        refused=refused,
        temperature=calibration(evaluated),
        thresholds=_thresholds(recipe, evaluated),
        card=card,
        reference=reference(evaluated),
    )
    return serve_model(recipe.serve, model)


def _thresholds(recipe: Recipe, evaluated: Artifact) -> dict[str, float]:
    """By single-label column, the probability below which no class is answered.

    Raises:
        InputError: no threshold makes answers right as often as is asked for.
    """
    wanted = recipe.serve.abstain
    if wanted is None:
        return {}
    curves = json.loads((evaluated.path / "abstention.json").read_text(encoding="utf-8"))
    single = [label.column for label in recipe.data.labels if not label.multi]
    if wanted.below is not None:
        return dict.fromkeys(single, wanted.below)
    assert wanted.accuracy is not None
    found = {}
    for name in single:
        curve = [Abstaining(**each) for each in curves.get(name, ())]
        threshold = threshold_for(wanted.accuracy, curve)
        if threshold is None:
            best = max((each.accuracy for each in curve), default=0.0)
            raise InputError(
                f"serve.abstain.accuracy is {wanted.accuracy:g}, but whatever is left unanswered, no more than "
                f"{best:.4f} of the answers for {name} were right in validation; set it lower."
            )
        found[name] = threshold
    return found


def _export(exported: Artifact | None) -> tuple[UPath | None, str]:
    """Where the export stands, or why there is none."""
    if exported is None:
        return None, ""
    folder = exported.path / ONNX
    if (folder / NOTES).exists():
        return folder, ""
    refused = json.loads((exported.path / "export.json").read_text(encoding="utf-8"))["refused"]
    return None, "; ".join(f"{name}: {why}" for name, why in refused.items())


def ask(url: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The live endpoint's results for the texts, over HTTP.

    Raises:
        ClusterError: it does not answer, or refuses; with its own sentence.
    """
    body = json.dumps({"texts": list(texts)}).encode()
    request = urllib.request.Request(f"{url}/v1/classify", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            results: list[dict[str, Any]] = json.load(response)["results"]
    except urllib.error.HTTPError as error:
        told = error.read().decode("utf-8", "replace")
        raise ClusterError(f"the endpoint at {url} refuses ({error.code}): {told}") from error
    except (OSError, ValueError) as error:
        raise ClusterError(f"the endpoint at {url} does not answer: {error}.") from error
    return results


def answer_rows(texts: Sequence[str], results: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """For a table: each text, what was answered, and the likeliest probabilities; a row for each label column."""
    rows = []
    for text, result in zip(texts, results, strict=True):
        for position, (name, answer) in enumerate(result["labels"].items()):
            label = answer["label"] if isinstance(answer["label"], str) else ", ".join(answer["label"] or ["(none)"])
            likeliest = sorted(answer["probabilities"].items(), key=lambda item: -item[1])[:3]
            rows.append(
                (
                    text if position == 0 else "",
                    label if len(result["labels"]) == 1 else f"{name}: {label}",
                    "  ".join(f"{each} {probability:.3f}" for each, probability in likeliest),
                )
            )
    return rows
