"""Asking a live endpoint, and showing what it answers."""

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.store import Artifact, ClusterError
from models.settings import InputError
from serve.security_settings import ExposureSettings, TlsSettings

KEY_VARIABLE = "SHOAL_API_KEY"
"""The environment variable with the key or token to ask with."""

_TIMEOUT_S = 60


def calibration(evaluated: Artifact) -> dict[str, float]:
    """By label column, the temperature that `evaluate` found."""
    found: dict[str, float] = json.loads((evaluated.path / "calibration.json").read_text(encoding="utf-8"))
    return found


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
