"""evaluate tells what the classifier is worth, by numbers that can be had otherwise too, and holds it to the gate."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from upath import UPath

from models.abstaining import Abstaining, threshold_for
from models.drift import NONE, Reference
from models.engine import Encoded
from models.labels import LabelColumn
from models.settings import InputError
from models.torch_engine import load_torch_engine
from pipelines import evaluate
from pipelines.evaluate import EvaluateSettings, GateError
from pipelines.evaluating import scoring
from pipelines.evaluating.calibration import probabilities
from pipelines.evaluating.scoring import score
from pipelines.prepared import Prepared
from pipelines.progress import Progress
from pipelines.stage import Task
from tests.pipelines.tiny import MOOD, TOPIC, artifact, make_classifier, make_prepared

SPLITS = {"train": 400, "validation": 200, "test": 200}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetune folder with a classifier of one label column."""
    folder = tmp_path_factory.mktemp("one")
    make_classifier(folder / "model")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two label columns, one of them multi-label."""
    folder = tmp_path_factory.mktemp("two")
    make_classifier(folder / "model", (TOPIC, MOOD))
    return folder


def task(
    finetuned: Path, tmp_path: Path, settings: dict[str, Any], labels: Sequence[LabelColumn] = (TOPIC,), **data: Any
) -> Task:
    prepared = make_prepared(tmp_path / "prepared", labels, **data)
    inputs = {"prepare": artifact(prepared, "prepare"), "finetune": artifact(finetuned, "finetune")}
    chosen = EvaluateSettings(precision="fp32", **settings)
    return Task(chosen, inputs, UPath(tmp_path / "out"), Progress(), "toy")


def reference_logits(finetuned: Path, texts: list[str]) -> np.ndarray:
    """The classifier's outputs, text by text, by nothing of ours."""
    model = AutoModelForSequenceClassification.from_pretrained(finetuned / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(finetuned / "model")
    with torch.no_grad():
        return np.concatenate([model(**tokenizer(text, return_tensors="pt")).logits.numpy() for text in texts])


def test_numbers_are_those_of_an_independent_calculation(one: Path, tmp_path: Path) -> None:
    todo = task(one, tmp_path, {}, missing=0.1)
    found = evaluate.run(todo)
    test = Prepared(UPath(tmp_path / "prepared")).read_split("test")
    labels = test["label:topic"].to_numpy()
    known = labels >= 0
    assert 0 < (~known).sum() < 50
    logits = reference_logits(one, test["text"].to_pylist())
    predicted = logits.argmax(axis=1)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels[known], predicted[known]))
    assert found["macro_f1"] == pytest.approx(f1_score(labels[known], predicted[known], average="macro"))
    assert found["rows"] == 200
    assert found["texts_per_second"] > 0
    document = json.loads((todo.out / "metrics.json").read_text())
    topic = document["columns"]["topic"]
    assert topic["labelled"] == known.sum()
    assert topic["confusion"] == confusion_matrix(labels[known], predicted[known]).tolist()
    precision, recall, f1, support = precision_recall_fscore_support(labels[known], predicted[known])
    for index, name in enumerate(TOPIC.classes):
        expected = [precision[index], recall[index], f1[index], support[index]]
        assert [topic["classes"][name][k] for k in ("precision", "recall", "f1", "support")] == pytest.approx(expected)
    rows = pq.read_table((todo.out / "predictions.parquet").path)
    assert rows["row"].to_pylist() == test["row"].to_pylist()
    assert rows["predicted:topic"].to_pylist() == [TOPIC.classes[index] for index in predicted]
    assert rows["label:topic"].to_pylist() == [TOPIC.classes[i] if i >= 0 else None for i in labels]
    calibration = json.loads((todo.out / "calibration.json").read_text())
    assert calibration == {"topic": found["temperature"]}
    expected = probabilities(logits, False, calibration["topic"])
    assert np.allclose(rows["probability:topic:animal"].to_numpy(), expected[:, 0], atol=1e-4)
    assert np.allclose(rows["probability:topic"].to_numpy(), expected.max(axis=1), atol=1e-4)


def test_the_temperature_comes_from_validation_and_mends_overconfidence(one: Path, tmp_path: Path) -> None:
    # The classifier has learnt the rule; a fifth of the labels breaks it, so it is too sure of itself.
    found = evaluate.run(task(one, tmp_path, {}, noise=0.2))
    assert found["temperature"] > 1.5
    assert found["calibrated_ece"] < found["ece"]
    assert found["calibrated_log_loss"] < found["log_loss"]


def test_what_abstaining_brings_is_measured_on_validation(two: Path, tmp_path: Path) -> None:
    todo = task(two, tmp_path, {}, (TOPIC, MOOD), noise=0.2)
    evaluate.run(todo)
    curves = json.loads((todo.out / "abstention.json").read_text())
    assert set(curves) == {"topic"}, "a multi-label column has no one class to answer"
    validation = Prepared(UPath(tmp_path / "prepared")).read_split("validation")
    labels = validation["label:topic"].to_numpy()
    temperature = json.loads((todo.out / "calibration.json").read_text())["topic"]
    found = probabilities(reference_logits(two, validation["text"].to_pylist())[:, :2], False, temperature)
    right = found.argmax(axis=1) == labels
    for each in curves["topic"][::10]:
        answered = found.max(axis=1) >= each["below"]
        assert each["answered"] == pytest.approx(answered.mean(), abs=0.02)
        assert each["accuracy"] == pytest.approx(right[answered].mean(), abs=0.02)
    curve = [Abstaining(**each) for each in curves["topic"]]
    assert threshold_for(curve[0].accuracy, curve) == 0.0
    assert threshold_for(1.1, curve) is None
    assert "no answer below" in (todo.out / "report.html").read_text()


def test_without_a_validation_split_probabilities_stay(one: Path, tmp_path: Path) -> None:
    found = evaluate.run(task(one, tmp_path, {}, rows={"train": 100, "validation": 0, "test": 50}))
    assert found["temperature"] == 1.0
    assert "no validation split" in (tmp_path / "out" / "model_card.md").read_text()
    reference = json.loads((tmp_path / "out" / "reference.json").read_text())
    assert (reference["split"], reference["texts"]) == ("test", 50)


def test_the_reference_is_of_the_validation_split(two: Path, tmp_path: Path) -> None:
    """Each share by a calculation of its own: the classifier asked text by text, with tokens that it does not know."""
    todo = task(two, tmp_path, {"baseline": False}, (TOPIC, MOOD))
    file = tmp_path / "prepared" / "validation" / "part-00000.parquet"
    rows = pq.read_table(file)
    ids = [[1 if token == 5 else token for token in row] for row in rows["input_ids"].to_pylist()]
    rows = rows.set_column(rows.column_names.index("input_ids"), "input_ids", pa.array(ids, pa.list_(pa.int32())))
    pq.write_table(rows, file, row_group_size=64)
    evaluate.run(todo)
    found = Reference.model_validate_json((todo.out / "reference.json").read_text())
    temperature = json.loads((todo.out / "calibration.json").read_text())
    engine = load_torch_engine(two / "model", precision="fp32", temperature=temperature)
    encoded = [Encoded(row, None, False) for row in ids]
    answers = engine.answers(encoded, engine.logits(encoded))
    assert (found.split, found.texts) == ("validation", 200)
    topics = [answer.labels["topic"] for answer in answers]
    for name in TOPIC.classes:
        assert found.columns["topic"].labels[name] == sum(one.label == name for one in topics) / 200
    moods = [label for answer in answers for label in answer.labels["mood"].label or [NONE]]
    assert {NONE, "glad"} <= set(moods)
    assert found.columns["mood"].labels == pytest.approx(
        {n: moods.count(n) / len(moods) for n in (*MOOD.classes, NONE)}
    )
    sure = [max(one.probabilities.values()) for one in topics]
    assert found.columns["topic"].confidence[-1] == pytest.approx(sum(value > 0.9 for value in sure) / 200, abs=0.011)
    assert sum(found.columns["topic"].confidence) == pytest.approx(1)
    assert found.lengths[0] == sum(len(row) <= 4 for row in ids) / 200
    tokens = [token for row in ids for token in row]
    assert 0 < found.unknown_tokens == tokens.count(1) / len(tokens)


def test_several_columns_and_slices(two: Path, tmp_path: Path) -> None:
    todo = task(two, tmp_path, {"slices": ("channel",)}, (TOPIC, MOOD), noise=0.0)
    found = evaluate.run(todo)
    assert found["topic.accuracy"] > 0.9
    rows = pq.read_table((todo.out / "predictions.parquet").path)
    held, said = (
        [[name in row for name in MOOD.classes] for row in rows[f"{what}:mood"].to_pylist()]
        for what in ("label", "predicted")
    )
    assert found["mood.subset_accuracy"] == pytest.approx(accuracy_score(held, said))
    assert found["mood.micro_f1"] == pytest.approx(f1_score(held, said, average="micro"))
    assert found["baseline.mood.micro_f1"] > 0.9
    slices = json.loads((todo.out / "metrics.json").read_text())["columns"]["topic"]["slices"]
    channels = Prepared(UPath(tmp_path / "prepared")).read_split("test")["column:channel"].to_pylist()
    assert {(one["value"], one["rows"]) for one in slices} == {
        (v or "(none)", channels.count(v)) for v in set(channels)
    }
    assert {one["value"]: one["small"] for one in slices} == {"web": False, "mail": True, "(none)": True}
    html, card = (todo.out / "report.html").read_text(), (todo.out / "model_card.md").read_text()
    for said in ("By channel", "topic: confusion", "mood: calibration", "<svg"):
        assert said in html
    for said in ("## Label column `mood`", "TF-IDF baseline", "channel = web", "d" * 32):
        assert said in card


def test_the_model_card_s_example_runs(one: Path, tmp_path: Path) -> None:
    todo = task(one, tmp_path, {"baseline": False})
    evaluate.run(todo)
    card = (todo.out / "model_card.md").read_text()
    code = card.split("```python")[1].split("```")[0].replace(f"finetune/{one.name}/model", str(one / "model"))
    names: dict[str, Any] = {}
    exec(code, names)
    (answer,) = names["engine"].classify(["the very good cat"])
    assert answer.labels["topic"].label == "animal"


def test_the_gate_fails_loudly_and_leaves_the_report(one: Path, tmp_path: Path) -> None:
    todo = task(one, tmp_path, {"gate": {"accuracy": 0.99, "macro_f1": 0.1}, "baseline": False})
    with pytest.raises(GateError, match=r"accuracy is 0\.\d{4}, less than 0\.99") as failure:
        evaluate.run(todo)
    assert "macro_f1" not in str(failure.value)
    assert str(todo.out / "report.html") in str(failure.value)
    assert "<html" in (todo.out / "report.html").read_text()
    gate = json.loads((todo.out / "metrics.json").read_text())["gate"]
    assert gate["accuracy"]["value"] < gate["accuracy"]["minimum"] == 0.99


def test_a_gate_that_cannot_be_is_refused_before_any_work(one: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="did you mean accuracy"):
        EvaluateSettings(gate={"acuracy": 0.9})
    with pytest.raises(ValidationError, match="83 is no minimum"):
        EvaluateSettings(gate={"accuracy": 83})
    todo = task(one, tmp_path, {"gate": {"mood.accuracy": 0.9}})
    with pytest.raises(InputError, match=r"evaluate\.gate: 'mood.accuracy' is no metric here"):
        evaluate.run(todo)
    assert not todo.out.exists()


def test_an_unknown_slice_and_an_empty_split_are_told(one: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluate\.slices: 'chanel' is not among .*channel"):
        evaluate.run(task(one, tmp_path / "a", {"slices": ("chanel",)}))
    with pytest.raises(InputError, match=r"the test split has no rows; raise prepare\.test_share"):
        evaluate.run(task(one, tmp_path / "b", {}, rows={"train": 10, "validation": 10, "test": 0}))


def test_the_cluster_scores_as_this_process_does(
    ray_session: None, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"train": 10, "validation": 130, "test": 333}
    prepared = Prepared(UPath(make_prepared(tmp_path / "prepared", (TOPIC, MOOD), rows, chunk_rows=50)))
    model = UPath(two / "model")
    here = score(prepared, ["validation", "test"], model, "fp32", Progress())
    monkeypatch.setattr(scoring, "IN_PROCESS_ROWS", 0)
    monkeypatch.setattr(scoring, "_TASK_ROWS", 100)
    there = score(prepared, ["validation", "test"], model, "fp32", Progress())
    for split in ("validation", "test"):
        assert np.allclose(here.splits[split].logits, there.splits[split].logits, atol=1e-5)
        assert (here.splits[split].rows == there.splits[split].rows).all()
    assert here.precision == there.precision == "fp32"
    wanted = score(prepared, ["validation"], model, "bf16", Progress()).precision
    assert wanted == load_torch_engine(two / "model", precision="bf16").precision


def test_a_classifier_that_failed_to_train_is_told(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "broken" / "model", steps=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.classifier.weight.data.fill_(float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="not finite"):
        evaluate.run(task(tmp_path / "broken", tmp_path, {}))
