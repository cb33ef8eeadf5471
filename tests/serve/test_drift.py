"""The metrics page tells what was answered, and how far it is from what the classifier was evaluated on."""

import json
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from models import drift
from models.engine import Answer, Engine, Prediction
from models.labels import LabelColumn
from models.settings import InputError
from models.torch_engine import load_torch_engine
from serve.drift import DriftMonitor, DriftSettings
from serve.gateway import build_gateway
from serve.settings import ServeSettings
from tests.serve.endpoint import running
from tests.small_classifiers import CORPUS, SENTIMENT, TOPICS, make_classifier, reference_by

SETTINGS = ServeSettings(max_texts=64, drift=DriftSettings(window_texts=40, min_texts=30))
LIKE_THEM, OTHERS = CORPUS * 10, ["zzz qqq"] * 44


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_torch_engine(make_classifier(tmp_path_factory.mktemp("served"), (SENTIMENT, TOPICS)), precision="fp32")


def samples(page: str, **labels: str) -> dict[str, dict[str, float]]:
    """By metric, the values by the other labels' values, in the order of the labels' names."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if labels.items() <= sample.labels.items():
                rest = [
                    v for k, v in sorted(sample.labels.items()) if k not in ("model", "version", "replica", *labels)
                ]
                found.setdefault(sample.name, {})["/".join(rest)] = sample.value
    return found


def test_drift_is_told_after_enough_texts(engine: Engine) -> None:
    with running(engine, SETTINGS, reference=reference_by(engine, LIKE_THEM)) as url:

        def page(texts: list[str]) -> dict[str, dict[str, float]]:
            assert httpx.post(f"{url}/v1/classify", json={"texts": texts}).status_code == 200
            return samples(httpx.get(f"{url}/metrics").text, model="small", version="f00d", replica="local")

        few = page(LIKE_THEM[:29])
        assert few["shoal_drift_texts"] == {"": 29}
        assert "shoal_drift_psi" not in few
        assert "shoal_unknown_token_difference" not in few
        assert few["shoal_unknown_token_share"] == {"": 0}
        same = page(LIKE_THEM[29:])
        signals = {f"{column.name}/{signal}" for column in (SENTIMENT, TOPICS) for signal in ("labels", "confidence")}
        assert set(same["shoal_drift_psi"]) == {*signals, "/length"}
        assert max(same["shoal_drift_psi"].values()) == pytest.approx(0, abs=1e-9)
        assert set(same["shoal_drift_psi_noise"]) == set(same["shoal_drift_psi"])
        assert same["shoal_unknown_token_difference"] == {"": pytest.approx(0)}
        other = page(OTHERS)
        assert other["shoal_drift_texts"] == {"": 42}
        assert min(other["shoal_drift_psi"].values()) > 0.25
        assert other["shoal_unknown_token_difference"] == {"": pytest.approx(0.5)}  # [CLS] and [SEP] are known


def test_answers_are_counted_by_label_whatever_shape_they_were_asked_in(engine: Engine) -> None:
    texts = CORPUS[:2]
    with running(engine, SETTINGS) as url:
        httpx.post(f"{url}/v1/classify", json={"texts": texts})
        httpx.post(f"{url}/predict", json={"inputs": texts, "raw_scores": True})
        httpx.post(f"{url}/", json={"inputs": texts})
        page = httpx.get(f"{url}/metrics").text
    given = samples(page)["shoal_predictions_total"]
    for column in engine.spec.labels:
        said = [answer.labels[column.name].label for answer in engine.classify(texts)] * 3
        for name in column.classes:
            held = sum(name in label if isinstance(label, list) else name == label for label in said)
            assert given[f"{column.name}/{name}"] == held
    assert set(given) == {f"{c.name}/{label}" for c in (SENTIMENT, TOPICS) for label in (*c.classes, "_none_")}
    confidence = samples(page, column="sentiment")
    sure = [max(answer.labels["sentiment"].probabilities.values()) for answer in engine.classify(texts)] * 3
    assert confidence["shoal_confidence_count"] == {"": 6}
    assert confidence["shoal_confidence_sum"] == {"": pytest.approx(sum(sure), rel=1e-5)}
    for edge in ("0.4", "0.5", "0.9", "1.0"):
        assert confidence["shoal_confidence_bucket"][edge] == sum(value <= float(edge) for value in sure)
    # Nothing to compare with: no drift is told.
    assert not {"shoal_drift_psi", "shoal_reference_label_share"} & set(samples(page))


def test_the_references_shares_stand_beside(engine: Engine) -> None:
    known = reference_by(engine, LIKE_THEM)
    page = build_gateway(engine, SETTINGS, name="small", version="f00d", reference=known).state.metrics.page()
    told = samples(page, column="sentiment")["shoal_reference_label_share"]
    assert told == pytest.approx(known["columns"]["sentiment"]["labels"])


def test_what_is_no_finite_number_counts_as_no_label(engine: Engine) -> None:
    monitor = DriftMonitor(engine, DriftSettings(), ("small", "f00d", "local"), None)
    failed = Answer({name: Prediction(None, {}) for name in ("sentiment", "topics")}, False, 4)
    monitor.observe(engine.encode(["late"]), [failed])
    given = {s.labels["column"] for f in monitor.collect() for s in f.samples if s.labels.get("label") == "_none_"}
    counted = [s.value for f in monitor.collect() for s in f.samples if s.labels.get("label") == "_none_"]
    assert (given, counted) == ({"sentiment", "topics"}, [1, 1])


def test_classes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "MAX_LABELS", 2)
    many = LabelColumn(name="many", classes=tuple("abcdefgh"))
    engine = load_torch_engine(make_classifier(tmp_path, (many,)), precision="fp32")
    monitor = DriftMonitor(engine, DriftSettings(), ("small", "f00d", "local"), None)
    encoded = engine.encode(CORPUS)
    probabilities = dict.fromkeys(many.classes, 0.1)
    monitor.observe(encoded, [Answer({"many": Prediction(label, probabilities)}, False, 4) for label in "ahg"])
    (family,) = (family for family in monitor.collect() if family.name == "shoal_predictions")
    assert {s.labels["label"]: s.value for s in family.samples} == {"a": 1, "b": 0, "_other_": 2, "_none_": 0}


def test_a_reference_that_is_not_this_classifiers_is_refused(engine: Engine) -> None:
    known = reference_by(engine, LIKE_THEM)
    renamed = json.loads(json.dumps(known).replace("positive", "glad"))
    for wrong, told in ((renamed, "sentiment"), ({**known, "columns": {}}, "sentiment"), ({}, "damaged")):
        with pytest.raises(InputError, match=rf"reference\.json.*{told}.*evaluate anew"):
            build_gateway(engine, SETTINGS, name="small", version="f00d", reference=wrong)


def test_a_window_smaller_than_what_it_must_hold_is_refused() -> None:
    with pytest.raises(ValidationError, match="min_texts is 200, more than window_texts, 100"):
        ServeSettings.model_validate({"drift": {"window_texts": 100}})
