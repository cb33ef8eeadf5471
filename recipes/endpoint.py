"""From a recipe's artifacts to a live endpoint, and asking it."""

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
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
from serve.security_settings import ExposureSettings, TlsSettings

KEY_VARIABLE = "SHOAL_API_KEY"
"""The environment variable with the key or token to ask with."""

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
        InputError: the recipe's address cannot work on this cluster, or no key opens the endpoint.
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
    # The store's root: an artifact stands at STORE/STAGE/FINGERPRINT.
    return serve_model(recipe.serve, model, store=tuned.path.parent.parent)


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


def key_to_ask_with(settings: ExposureSettings) -> str | None:
    """The key or token to ask the endpoint with; None where it needs none.

    Raises:
        InputError: it needs one, and the environment holds none.
    """
    if not settings.guarded:
        return None
    if not (key := os.environ.get(KEY_VARIABLE)):
        raise InputError(
            f"--ask needs a key, as the endpoint demands one; set the environment variable {KEY_VARIABLE}."
        )
    return key


def ask(
    url: str, texts: Sequence[str], *, key: str | None = None, tls: TlsSettings | None = None
) -> list[dict[str, Any]]:
    """The live endpoint's results for the texts, over HTTP; with TLS it must show the certificate that it was given.

    Raises:
        ClusterError: it does not answer, or refuses; with its own sentence.
    """
    body = json.dumps({"texts": list(texts)}).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"{url}/v1/classify", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=_trusting(tls)) as response:
            results: list[dict[str, Any]] = json.load(response)["results"]
    except urllib.error.HTTPError as error:
        told = error.read().decode("utf-8", "replace")
        raise ClusterError(f"the endpoint at {url} refuses ({error.code}): {told}") from error
    except (OSError, ValueError) as error:
        raise ClusterError(f"the endpoint at {url} does not answer: {error}.") from error
    return results


def _trusting(tls: TlsSettings | None) -> ssl.SSLContext | None:
    """Trusts the endpoint's own certificate and no other, whoever signed it and whatever name it is for."""
    if tls is None:
        return None
    context = ssl.create_default_context(cafile=Path(tls.certificate).expanduser())
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


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
