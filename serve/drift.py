"""What a replica says of its answers and of drift, on its metrics page.

A replica counts what it answers in a window of its own (`models.window`); the numbers are made when the page is asked
for, never on the way of a request. Without a reference (a classifier that was served without `evaluate`) the answers
are counted all the same.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import Field, model_validator

from models.drift import (
    NONE,
    LabelBins,
    Reference,
    compare,
    unknown_difference,
    unknown_share,
)
from models.engine import Answer, Encoded, Engine, Prediction
from models.settings import InputError, Settings
from models.window import CONFIDENCE_EDGES, Tally, Window

_LABELS = ("model", "version", "replica")


class DriftSettings(Settings):
    """How the texts of a replica are compared with those that its classifier was evaluated on."""

    window_texts: int = Field(1000, ge=10, description="The last texts that a replica compares, up to a tenth more.")
    min_texts: int = Field(200, ge=1, description="Texts that there must be before drift is told.")

    @model_validator(mode="after")
    def _parts_agree(self) -> "DriftSettings":
        if self.min_texts > self.window_texts:
            raise ValueError(f"min_texts is {self.min_texts}, more than window_texts, {self.window_texts}")
        return self


class DriftMonitor(Collector):
    """Counts one replica's answers; as a collector of Prometheus' client it makes the page's numbers of them.

    Args:
        engine: whose answers they are.
        settings: of the window.
        own: the values of the labels model, version and replica.
        reference: what `evaluate` found, as `models.drift.Reference` in JSON types; None where there is none.

    Raises:
        InputError: the reference is damaged, or of a classifier with other labels.
    """

    def __init__(
        self, engine: Engine, settings: DriftSettings, own: tuple[str, str, str], reference: Mapping[str, Any] | None
    ) -> None:
        self._reference = _read(reference, engine)
        known = self._reference.columns if self._reference else {}
        self._bins = {column.name: LabelBins.of(column, known.get(column.name)) for column in engine.spec.labels}
        self._unknown_id = engine.unknown_id
        self._window = Window([len(bins.names) for bins in self._bins.values()], settings.window_texts)
        self._min_texts = settings.min_texts
        self._own = own
        # Answers come from the event loop, the page is asked for by other threads too.
        self._lock = threading.Lock()

    def observe(self, encoded: Sequence[Encoded], answers: Sequence[Answer]) -> None:
        """Counts texts that were answered: some microseconds each."""
        unknown_id = self._unknown_id
        with self._lock:
            for item, answer in zip(encoded, answers, strict=True):
                ids, labels = item.ids, answer.labels
                unknown = 0 if unknown_id is None else ids.count(unknown_id)
                said = [_said(labels[name], bins.place) for name, bins in self._bins.items()]
                self._window.add(len(ids), unknown, said)

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        with self._lock:
            counts, totals, sums = self._window.counts(), self._window.totals(), list(self._window.confidence_sums)
        yield self._predictions(totals)
        yield self._confidence(totals, sums)
        yield self._gauge("shoal_drift_texts", "Texts in the window that is compared with the reference.", counts.texts)
        if counts.texts:
            text = "Share of the window's tokens that the vocabulary lacks."
            yield self._gauge("shoal_unknown_token_share", text, unknown_share(counts))
        if self._reference:
            yield from self._drift(self._reference, counts)

    def _predictions(self, totals: Tally) -> Metric:
        text = "Labels given; of a text of which no class holds, _none_, of the rarest beyond 200 classes, _other_."
        family = CounterMetricFamily("shoal_predictions", text, labels=(*_LABELS, "column", "label"))
        for (name, bins), column in zip(self._bins.items(), totals.columns, strict=True):
            for label, count in zip(bins.names, column.labels, strict=True):
                family.add_metric((*self._own, name, label), count)
        return family

    def _confidence(self, totals: Tally, sums: Sequence[float]) -> Metric:
        text = "Calibrated probability of the likeliest class."
        family = HistogramMetricFamily("shoal_confidence", text, labels=(*_LABELS, "column"))
        for name, column, total in zip(self._bins, totals.columns, sums, strict=True):
            edges = [*(str(edge) for edge in CONFIDENCE_EDGES), "1.0"]
            below = list(accumulate(column.confidence))
            buckets = [*zip(edges, below, strict=True), ("+Inf", below[-1])]
            family.add_metric((*self._own, name), buckets, total)
        return family

    def _drift(self, reference: Reference, counts: Tally) -> Iterator[Metric]:
        text = "Share of a label in the reference."
        expected = GaugeMetricFamily("shoal_reference_label_share", text, labels=(*_LABELS, "column", "label"))
        for name, bins in self._bins.items():
            for label, share in zip(bins.names, bins.expected(reference.columns[name]), strict=True):
                expected.add_metric((*self._own, name, label), share)
        yield expected
        by_signal = (*_LABELS, "signal", "column")
        found = GaugeMetricFamily("shoal_drift_psi", "Population stability index of the window.", labels=by_signal)
        noise = GaugeMetricFamily(
            "shoal_drift_psi_noise", "The index that one window of a hundred exceeds by chance.", labels=by_signal
        )
        if counts.texts >= self._min_texts:
            for shift in compare(reference, self._bins, counts):
                found.add_metric((*self._own, shift.signal, shift.column), shift.psi)
                noise.add_metric((*self._own, shift.signal, shift.column), shift.noise)
        yield found
        yield noise
        if counts.texts >= self._min_texts:
            text = "Share of the window's tokens that the vocabulary lacks, less the reference's."
            yield self._gauge("shoal_unknown_token_difference", text, unknown_difference(reference, counts))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._own, value)
        return family


def _said(prediction: Prediction, place: Mapping[str, int]) -> tuple[Sequence[int], float]:
    """The bins of a text's labels, and the likeliest class's probability."""
    label = prediction.label
    if isinstance(label, str):
        return (place[label],), prediction.probabilities[label]
    likeliest = max(prediction.probabilities.values(), default=0.0)
    return [place[each] for each in label] if label else (place[NONE],), likeliest


def _read(reference: Mapping[str, Any] | None, engine: Engine) -> Reference | None:
    if reference is None:
        return None
    try:
        found = Reference.model_validate(reference)
    except ValueError as error:
        raise InputError("the reference of the evaluation (reference.json) is damaged; evaluate anew.") from error
    for column in engine.spec.labels:
        known = found.columns.get(column.name)
        if known is None or not known.labels.keys() <= {*column.classes, NONE}:
            raise InputError(
                f"the reference of the evaluation (reference.json) is of a classifier with other labels than "
                f"{column.name} has; evaluate anew."
            )
    return found
