"""Asking a live endpoint, and showing what it answers."""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from cluster.store import Artifact, ClusterError

_TIMEOUT_S = 60


def calibration(evaluated: Artifact) -> dict[str, float]:
    """By label column, the temperature that `evaluate` found."""
    found: dict[str, float] = json.loads((evaluated.path / "calibration.json").read_text(encoding="utf-8"))
    return found


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
