"""The metrics agree with scikit-learn's, and the temperature is the one that makes probabilities frequencies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from models.labels import LabelColumn
from models.settings import InputError
from pipelines.evaluating.calibration import fit_temperature, log_loss, probabilities, reliability
from pipelines.metrics import METRICS, check_metric, classification_metrics, metric_of, metric_problem

COLOUR = LabelColumn(name="colour", classes=("blue", "green", "red"))
SHAPE = LabelColumn(name="shape", classes=("flat", "round"), multi=True)
# scikit-learn cuts probabilities below 2e-16 off before it takes their logarithm.
logit = st.floats(-10, 10, width=32)


@settings(deadline=None)
@given(st.data(), st.integers(1, 40))
def test_single_label_agrees_with_scikit_learn(data: st.DataObject, n: int) -> None:
    logits = data.draw(hnp.arrays(np.float32, (n, 3), elements=logit))
    labels = data.draw(hnp.arrays(np.int32, n, elements=st.integers(-1, 2)))
    found = classification_metrics(logits, {"colour": labels}, [COLOUR])
    known = labels >= 0
    if not known.any():
        assert found == {}
        return
    predicted, labels = logits[known].argmax(axis=1), labels[known]
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    for average in ("macro", "weighted"):
        expected = sk.f1_score(labels, predicted, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(expected)
    expected = sk.log_loss(labels, probabilities(logits[known], False), labels=[0, 1, 2])
    assert found["log_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@settings(deadline=None)
@given(st.data(), st.integers(1, 40))
def test_multi_label_agrees_with_scikit_learn(data: st.DataObject, n: int) -> None:
    logits = data.draw(hnp.arrays(np.float32, (n, 2), elements=logit))
    labels = data.draw(hnp.arrays(np.bool_, (n, 2)))
    found = classification_metrics(logits, {"shape": labels}, [SHAPE])
    predicted = logits >= 0
    assert found["subset_accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert found["micro_f1"] == pytest.approx(sk.f1_score(labels, predicted, average="micro", zero_division=0))
    # Where scikit-learn counts a class that occurs nowhere as a failure, it is left out here.
    occurs = np.flatnonzero(labels.any(axis=0) | predicted.any(axis=0))
    macro = [sk.f1_score(labels[:, i], predicted[:, i], zero_division=0) for i in occurs]
    assert found["macro_f1"] == pytest.approx(np.mean(macro) if macro else 0.0)


def test_several_columns_have_prefixes_and_their_own_logits() -> None:
    logits = np.array([[9, 0, 0, -5, 5], [0, 9, 0, 5, -5]], np.float32)
    labels = {"colour": np.array([0, 2]), "shape": np.array([[False, True], [True, True]])}
    found = classification_metrics(logits, labels, [COLOUR, SHAPE])
    assert found["colour.accuracy"] == 0.5
    assert found["shape.subset_accuracy"] == 0.5
    assert found["shape.micro_f1"] == pytest.approx(0.8)
    assert metric_of(found, "colour.accuracy", [COLOUR, SHAPE]) == 0.5
    mean = (found["colour.macro_f1"] + found["shape.macro_f1"]) / 2
    assert metric_of(found, "macro_f1", [COLOUR, SHAPE]) == pytest.approx(mean)


def test_a_metric_of_a_column_without_labels_is_told() -> None:
    found = classification_metrics(np.zeros((3, 3), np.float32), {"colour": np.full(3, -1)}, [COLOUR])
    with pytest.raises(InputError, match="accuracy cannot be told: no row"):
        metric_of(found, "accuracy", [COLOUR])


def test_unknown_metrics_are_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"finetune\.metric: 'acuracy' is no metric here; did you mean accuracy\?"):
        check_metric("finetune.metric", "acuracy", [COLOUR])
    with pytest.raises(InputError, match="subset_accuracy"):
        check_metric("evaluate.gate", "accuracy", [SHAPE])
    with pytest.raises(InputError, match=r"colour\.accuracy"):
        check_metric("evaluate.gate", "color.accuracy", [COLOUR, SHAPE])
    check_metric("evaluate.gate", "macro_f1", [COLOUR, SHAPE])
    check_metric("evaluate.gate", "shape.micro_f1", [COLOUR, SHAPE])
    assert metric_problem("anything.macro_f1") is None
    assert metric_problem("log_loss") is not None
    assert "log_loss" not in METRICS


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("multi", [False, True])
def test_the_temperature_that_drew_the_labels_is_found(true_temperature: float, multi: bool) -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(scale=3, size=(20_000, 3)).astype(np.float32)
    chances = probabilities(logits, multi, true_temperature)
    uniform = draw.random((len(logits), 1))
    labels = draw.random(logits.shape) < chances if multi else (uniform > chances.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    temperature = fit_temperature(logits, labels, multi)
    assert temperature == pytest.approx(true_temperature, rel=0.05)
    assert log_loss(logits, labels, multi, temperature) <= log_loss(logits, labels, multi) + 1e-9
    assert reliability(probabilities(logits, multi, temperature), labels, multi).error < 0.012


def test_the_calibration_error_of_a_known_case() -> None:
    sure = np.array([[0.9, 0.1]] * 10)
    labels = np.array([0] * 5 + [1] * 5)
    assert reliability(sure, labels, multi=False).error == pytest.approx(0.4)
    assert fit_temperature(np.zeros((0, 2), np.float32), np.zeros(0, int), multi=False) == 1.0
