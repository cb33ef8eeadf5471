"""Comparing engines of one classifier: what they say of the validation texts, their size and their speed."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.engine import Encoded, Engine, FloatArray
from models.labels import LabelColumn, spans
from pipelines.metrics import column_metrics, decide

_TIMED_TEXTS = 200
_ROUND_S = 1.0
_ROUNDS = 3


@dataclass(frozen=True)
class Compared:
    """One engine beside the reference, which is torch."""

    engine: str
    precision: str
    agreement: float
    """The share of the texts for which it decides as the reference does in every label column."""
    difference: float
    """The largest difference of a calibrated probability."""
    macro_f1: dict[str, float]
    """By label column; those without labels are left out."""
    bytes: int
    texts_per_second: float
    """One by one on one core."""
    note: str = ""
    """What was done to it besides."""

    @property
    def name(self) -> str:
        """As tables show it."""
        return engine_name(self.engine, self.precision, self.note)

    def macro_f1_loss(self, reference: "Compared") -> float:
        """How much less macro-F1 it has than the reference, in the label column that loses most."""
        return max((value - self.macro_f1[name] for name, value in reference.macro_f1.items()), default=0.0)


def engine_name(engine: str, precision: str, note: str = "") -> str:
    """As tables show it."""
    return f"{engine} {precision}" + (f", {note}" if note else "")


def compare(
    engines: Sequence[Engine],
    sizes: Sequence[int],
    encoded: Sequence[Encoded],
    labels: Mapping[str, Any],
    columns: Sequence[LabelColumn],
) -> list[Compared]:
    """Compares the engines, the first of which is the reference.

    Args:
        engines: of one classifier.
        sizes: the bytes of each one's files.
        encoded: the texts.
        labels: by label column, as `pipelines.metrics` takes them.
        columns: the label columns.
    """
    logits = [engine.logits(encoded) for engine in engines]
    speeds = _texts_per_second(engines, encoded)
    probabilities = [engine.probabilities(found) for engine, found in zip(engines, logits, strict=True)]
    return [
        Compared(
            engine=engine.name,
            precision=engine.precision,
            agreement=_agreement(own, logits[0], columns),
            difference=max(float(np.abs(said[name] - probabilities[0][name]).max()) for name in said),
            macro_f1=_macro_f1(own, labels, columns),
            bytes=size,
            texts_per_second=speed,
        )
        for engine, size, own, said, speed in zip(engines, sizes, logits, probabilities, speeds, strict=True)
    ]


def folder_bytes(folder: Path, suffixes: Sequence[str]) -> int:
    """The bytes of a model's files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.name.endswith(tuple(suffixes)))


def _agreement(logits: FloatArray, reference: FloatArray, columns: Sequence[LabelColumn]) -> float:
    same = np.ones(len(logits), dtype=bool)
    for column, span in spans(columns):
        equal = decide(logits[:, span], column.multi) == decide(reference[:, span], column.multi)
        same &= equal.all(axis=1) if column.multi else equal
    return float(same.mean())


def _macro_f1(logits: FloatArray, labels: Mapping[str, Any], columns: Sequence[LabelColumn]) -> dict[str, float]:
    found = {}
    for column, span in spans(columns):
        if metrics := column_metrics(logits[:, span], labels[column.name], column.multi):
            found[column.name] = metrics["macro_f1"]
    return found


def _texts_per_second(engines: Sequence[Engine], encoded: Sequence[Encoded]) -> list[float]:
    """The median of rounds in turn, so that what else the machine does meets all engines alike."""
    # Evenly from the sorted lengths: a few texts of the real lengths.
    by_length = sorted(encoded, key=lambda item: len(item.ids))
    texts = by_length[:: max(1, len(by_length) // _TIMED_TEXTS)]
    for engine in engines:
        engine.forward(texts[-1:])
    rounds: list[list[float]] = [[] for _ in engines]
    for _ in range(_ROUNDS):
        for engine, found in zip(engines, rounds, strict=True):
            done, started = 0, time.perf_counter()
            while done == 0 or (done < 2 * len(texts) and time.perf_counter() - started < _ROUND_S):
                # A step that is prime to most counts, so that a round cut short has seen all lengths.
                engine.forward([texts[done * 37 % len(texts)]])
                done += 1
            found.append(done / (time.perf_counter() - started))
    return [statistics.median(found) for found in rounds]
