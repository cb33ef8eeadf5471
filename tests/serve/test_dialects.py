"""Clients of text-embeddings-inference and of Hugging Face get from the endpoint what they expect."""

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from models.engine import Engine
from models.torch_engine import load_torch_engine
from serve.settings import ServeSettings
from tests.serve.endpoint import running
from tests.small_classifiers import CORPUS, SENTIMENT, TOPICS, make_classifier

SETTINGS = ServeSettings(max_texts=4)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = make_classifier(tmp_path_factory.mktemp("single"))
    return load_torch_engine(folder, precision="fp32", temperature={"sentiment": 2.0})


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with running(engine, SETTINGS) as url:
        yield url


@pytest.fixture(scope="module")
def pair_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_classifier(tmp_path_factory.mktemp("pair"), (SENTIMENT, TOPICS), pair=True)
    with running(load_torch_engine(folder, precision="fp32"), SETTINGS) as url:
        yield url


def expected(engine: Engine, text: str) -> list[dict[str, Any]]:
    """Label and score of every class, the likeliest first."""
    (answer,) = engine.classify([text])
    found = [{"label": name, "score": value} for name, value in answer.labels["sentiment"].probabilities.items()]
    return sorted(found, key=lambda each: -each["score"])


def assert_scores(found: Any, wanted: list[dict[str, Any]]) -> None:
    assert [each["label"] for each in found] == [each["label"] for each in wanted]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in wanted], abs=1e-6)


def test_hugging_faces_own_client_works_unchanged(url: str, engine: Engine) -> None:
    client = InferenceClient(model=url)
    assert_scores(client.text_classification(CORPUS[0]), expected(engine, CORPUS[0]))
    assert_scores(client.text_classification(CORPUS[1], top_k=1), expected(engine, CORPUS[1])[:1])
    logits = engine.logits(engine.encode([CORPUS[0]]))[0]
    sigmoid = client.text_classification(CORPUS[0], function_to_apply="sigmoid")
    assert [each.score for each in sigmoid] == pytest.approx(sorted(1 / (1 + np.exp(-logits)), reverse=True), abs=1e-6)
    with pytest.raises(HfHubHTTPError, match="inputs\\[0\\] is empty"):
        client.text_classification(" ")


def test_predict_answers_as_text_embeddings_inference_does(url: str, engine: Engine) -> None:
    def predict(**body: Any) -> Any:
        response = httpx.post(f"{url}/predict", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    assert_scores(predict(inputs=CORPUS[0]), expected(engine, CORPUS[0]))
    for listed in (CORPUS, [[text] for text in CORPUS]):
        for found, text in zip(predict(inputs=listed), CORPUS, strict=True):
            assert_scores(found, expected(engine, text))
    logits = engine.logits(engine.encode([CORPUS[0]]))[0]
    raw = predict(inputs=CORPUS[0], raw_scores=True)
    assert [each["score"] for each in raw] == pytest.approx(sorted(logits, reverse=True), abs=1e-5)
    assert predict(inputs="late " * 100, truncate=True)


def test_pairs_and_several_columns(pair_url: str) -> None:
    one = httpx.post(f"{pair_url}/predict", json={"inputs": ["the flight was late", "again"]}).json()
    assert {each["label"] for each in one} == {
        *(f"sentiment/{name}" for name in SENTIMENT.classes),
        *(f"topics/{name}" for name in TOPICS.classes),
    }
    two = httpx.post(f"{pair_url}/predict", json={"inputs": [["the flight was late", "again"], ["a", "b"]]}).json()
    assert [each["label"] for each in two[0]] == [each["label"] for each in one]
    assert [each["score"] for each in two[0]] == pytest.approx([each["score"] for each in one], abs=1e-6)
    refused = httpx.post(f"{pair_url}/predict", json={"inputs": "alone"})
    assert refused.status_code == 422
    assert refused.json()["error"] == "inputs[0] holds 1 texts, but the model takes pairs of texts."


def test_information_and_health(url: str) -> None:
    told = httpx.get(f"{url}/info").json()
    assert told["model_id"] == "small"
    assert told["model_type"]["classifier"]["id2label"] == {"0": "negative", "1": "neutral", "2": "positive"}
    assert told["max_client_batch_size"] == 4
    health = httpx.get(f"{url}/health")
    assert (health.status_code, health.content) == (200, b"")


@pytest.mark.parametrize("path", ["/", "/predict"])
@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "cannot be read as JSON in UTF-8"),
        (b"\xff", 400, "cannot be read as JSON in UTF-8"),
        (b"[]", 422, "The request's body: "),
        (b"{}", 422, "inputs: Field required"),
        (b'{"inputs": 3}', 422, "inputs must be a text, a list of texts, or a list of lists of texts"),
        (b'{"inputs": []}', 422, "inputs is empty"),
        (b'{"inputs": ["a", " "]}', 422, "inputs[1] is empty"),
        (b'{"inputs": [["a", "b"]]}', 422, "inputs[0] holds 2 texts, but the model takes single texts"),
        (b'{"inputs": ["a", "b", "c", "d", "e"]}', 413, "inputs holds 5 texts, more than 4"),
    ],
)
def test_mistakes_are_told_as_clients_look_for_them(
    url: str, path: str, body: bytes, status: int, sentence: str
) -> None:
    response = httpx.post(url + path, content=body)
    told = response.json()
    assert response.status_code == told["status"] == status
    assert sentence in told["detail"]
    assert told["error"] == told["detail"]
    assert told["error_type"] == "validation"


def test_a_text_that_must_not_be_cut_is_refused(url: str) -> None:
    response = httpx.post(f"{url}/predict", json={"inputs": ["late", "late " * 100], "truncate": False})
    assert response.status_code == 413
    assert response.json()["error"] == "inputs[1] has more than 32 tokens; send it with truncate: true."
