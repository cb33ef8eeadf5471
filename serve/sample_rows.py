"""From a request and its answers to rows of a sample's file, masked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from models.engine import Answer
from models.redaction import Redactor
from models.text import TextSettings, cleaned


@dataclass(frozen=True, slots=True)
class Sample:
    """A request that was chosen."""

    request_id: str
    time: str
    texts: Sequence[str]
    pairs: Sequence[str] | None
    answers: Sequence[Answer]
    characters: int
    """Of texts and partners."""


class SampleRows:
    """Makes rows.

    A row has the `text` (and its `pair`) as the classifier reads it, and masked. What is answered stands in
    `predicted_COLUMN` and `probabilities_COLUMN`, so that nobody takes it for a label.

    Args:
        text: how the classifier's texts are cleaned.
        redactors: what masks them besides.
        model: the model's name.
        version: its version.
    """

    def __init__(self, text: TextSettings, redactors: Sequence[Redactor], model: str, version: str) -> None:
        # What is hidden by damage is mended first, so that it is seen.
        self._cleaning = text.model_copy(update={"repair": True})
        self._redactors = redactors
        self._about = {"model": model, "version": version}

    def lines(self, sample: Sample) -> list[str]:
        """A line of JSON for each text."""
        texts = self._masked(sample.texts)
        pairs = [{}] * len(texts) if sample.pairs is None else [{"pair": each} for each in self._masked(sample.pairs)]
        about = self._about | {"time": sample.time, "request_id": sample.request_id}
        return [
            json.dumps({"text": text} | pair | _answered(answer) | about, ensure_ascii=False)
            for text, pair, answer in zip(texts, pairs, sample.answers, strict=True)
        ]

    def _masked(self, texts: Sequence[str]) -> list[str]:
        found = cleaned(texts, self._cleaning)
        for redactor in self._redactors:
            found = redactor.redact_all(found)
        return found


def _answered(answer: Answer) -> dict[str, object]:
    row: dict[str, object] = {}
    for name, said in answer.labels.items():
        row[f"predicted_{name}"] = said.label
        row[f"probabilities_{name}"] = {label: round(value, 6) for label, value in said.probabilities.items()}
    return row
