"""Calibration: whether a classifier's probabilities are frequencies, and the temperature that makes them so.

A temperature T divides a label column's logits before the softmax (or sigmoid). It is the T with the least log
loss on the validation split (Guo et al. 2017). It changes no prediction of a single-label column: only how
sure the classifier says it is.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, softmax

from models.abstaining import Abstaining

Floats = npt.NDArray[np.floating]

BINS = 15
_LOG_TEMPERATURES = (np.log(0.05), np.log(20.0))


@dataclass(frozen=True)
class Reliability:
    """Predictions in bins of equal width by confidence: the points of a reliability diagram. Arrays [BINS]."""

    count: npt.NDArray[np.int64]
    confidence: Floats
    """Mean confidence in the bin, NaN where it is empty."""
    frequency: Floats
    """How often the bin's predictions were right, NaN where it is empty."""

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of confidence and frequency, weighted by count."""
        full = self.count > 0
        distance = np.abs(self.confidence[full] - self.frequency[full])
        return float(np.average(distance, weights=self.count[full])) if full.any() else 0.0


def probabilities(logits: Floats, multi: bool, temperature: float = 1.0) -> Floats:
    """[n, classes] logits of one column as probabilities, float64."""
    scaled = logits.astype(np.float64) / temperature
    return np.asarray(expit(scaled) if multi else softmax(scaled, axis=1))


def log_loss(logits: Floats, labels: npt.NDArray[Any], multi: bool, temperature: float = 1.0) -> float:
    """Mean negative log likelihood in nats: of a text's label, or of one class's yes or no where `multi`.

    `labels` are indices [n], all present, or truth values [n, classes].
    """
    scaled = logits.astype(np.float64) / temperature
    if multi:
        return float(-np.where(labels, log_expit(scaled), log_expit(-scaled)).mean())
    return float(-log_softmax(scaled, axis=1)[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: Floats, labels: npt.NDArray[Any], multi: bool) -> float:
    """The temperature, within 0.05 to 20, with the least log loss; 1 where there is nothing to fit it on."""
    if len(labels) == 0:
        return 1.0
    # The loss is convex in 1/T, so it has one minimum in log T too: a scalar search finds it.
    found = minimize_scalar(
        lambda log_t: log_loss(logits, labels, multi, float(np.exp(log_t))),
        bounds=_LOG_TEMPERATURES,
        method="bounded",
    )
    return float(np.exp(found.x))


def abstaining(probability: Floats, labels: npt.NDArray[Any]) -> list[Abstaining]:
    """For thresholds from 0 in steps of 1/100, of [n, classes] probabilities; ends where nothing is answered."""
    confidence, right = probability.max(axis=1), probability.argmax(axis=1) == labels
    found = []
    for hundredth in range(100):
        answered = confidence >= hundredth / 100
        if not answered.any():
            break
        found.append(Abstaining(hundredth / 100, float(answered.mean()), float(right[answered].mean())))
    return found


def reliability(probability: Floats, labels: npt.NDArray[Any], multi: bool) -> Reliability:
    """Bins the top class's probability against being right; where `multi`, each class's against holding."""
    if multi:
        confidence, right = probability.ravel(), labels.astype(bool).ravel()
    else:
        confidence, right = probability.max(axis=1), probability.argmax(axis=1) == labels
    which = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(which, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return Reliability(
            count=count,
            confidence=np.bincount(which, weights=confidence, minlength=BINS) / count,
            frequency=np.bincount(which, weights=right, minlength=BINS) / count,
        )
