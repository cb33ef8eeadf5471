"""What a client gets over real HTTP: answers, and for every mistake one clear sentence."""

import asyncio
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.engine import Engine
from models.settings import InputError
from models.torch_engine import load_torch_engine
from serve.gateway import build_gateway
from serve.settings import ServeSettings
from tests.serve.endpoint import post, problem_of, raw, running
from tests.small_classifiers import CORPUS, SENTIMENT, TOPICS, make_classifier

SETTINGS = ServeSettings(max_texts=8, max_body_bytes=20_000, body_timeout_s=0.5)
CARD = {"metrics": {"accuracy": 0.9, "loss": math.inf}, "lineage": {"prepare": "abc"}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_torch_engine(make_classifier(tmp_path_factory.mktemp("single"), (SENTIMENT, TOPICS)), precision="fp32")


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with running(engine, SETTINGS, card=CARD) as url:
        yield url


@pytest.fixture(scope="module")
def pair_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_classifier(tmp_path_factory.mktemp("pair"), pair=True)
    with running(load_torch_engine(folder, precision="fp32"), SETTINGS) as url:
        yield url


def test_answers_are_those_of_the_engine_in_order(url: str, engine: Engine) -> None:
    texts = [*CORPUS, "bag " * 60]
    response = httpx.post(f"{url}/v1/classify", json={"texts": texts})
    assert response.status_code == 200
    answer = response.json()
    assert (answer["model"], answer["version"]) == ("small", "f00d")
    for found, expected in zip(answer["results"], engine.classify(texts), strict=True):
        assert (found["truncated"], found["tokens"]) == (expected.truncated, expected.tokens)
        for name, prediction in expected.labels.items():
            assert found["labels"][name]["label"] == prediction.label
            assert found["labels"][name]["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)
    assert [result["truncated"] for result in answer["results"]] == [False, False, False, True]


def test_a_pair_is_a_list_of_two(pair_url: str) -> None:
    response = httpx.post(f"{pair_url}/v1/classify", json={"texts": [["good", "crew"], ["crew", "good"]]})
    first, second = (result["labels"]["sentiment"]["probabilities"] for result in response.json()["results"])
    assert first != second


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"", 400, "cannot be read as JSON in UTF-8"),
        (b"texts", 400, "cannot be read as JSON in UTF-8"),
        (b'{"texts": ["a"]', 400, "cannot be read as JSON in UTF-8"),
        (b'{"texts": ["\xff\xfe"]}', 400, "cannot be read as JSON in UTF-8"),
        ('{"texts": ["late"]}'.encode("utf-16"), 400, "cannot be read as JSON in UTF-8"),
        (b"[" * 5000, 400, "cannot be read as JSON in UTF-8"),
        (b'{"texts": ["\\ud800 alone"]}', 422, "surrogate"),
        (b'{"texts": ["\\udc00"]}', 422, "surrogate"),
        (b'{"texts": ["\\u12"]}', 400, "invalid escape"),
        (b"[]", 422, "body must be an object, not a list"),
        (b"null", 422, "body must be an object, not null"),
        (b'"late"', 422, "body must be an object, not a string"),
        (b"{}", 422, "texts is missing"),
        (b'{"text": "late"}', 422, "texts is missing"),
        (b'{"texts": ["late"], "top_k": 3}', 422, "top_k is no field"),
        (b'{"texts": "late"}', 422, "texts must be a list, not a string"),
        (b'{"texts": null}', 422, "texts must be a list, not null"),
        (b'{"texts": {}}', 422, "texts must be a list, not an object"),
        (b'{"texts": []}', 422, "texts is empty"),
        (b'{"texts": ["late", 7]}', 422, "texts[1] must be a string, not a number"),
        (b'{"texts": ["late", NaN]}', 422, "texts[1] must be a string, not a number"),
        (b'{"texts": ["late", null]}', 422, "texts[1] must be a string, not null"),
        (b'{"texts": ["late", ["a", "b"]]}', 422, "texts[1] must be a string, not a list"),
        (b'{"texts": ["late", true]}', 422, "texts[1] must be a string, not true or false"),
        (b'{"texts": ["late", ""]}', 422, "texts[1] is empty"),
        (b'{"texts": [" \\n\\t\\u3000"]}', 422, "texts[0] is empty"),
        (json.dumps({"texts": ["late"] * 9}).encode(), 422, "more than 8 texts"),
        (json.dumps({"texts": ["x" * 30_000]}).encode(), 413, "larger than 20,000 bytes"),
    ],
)
def test_a_wrong_request_is_told_in_one_sentence(url: str, body: bytes, status: int, sentence: str) -> None:
    found, detail = problem_of(raw(url, post(body)))
    assert found == status
    assert sentence in detail


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["late"], "texts[0] must be a list of two texts, [text, partner], not a string"),
        ([["late"]], "texts[0] must be a list of two texts"),
        ([["late", "b", "c"]], "texts[0] must be a list of two texts"),
        ([["late", 3]], "texts[0][1] must be a string, not a number"),
        ([["late", ""]], "texts[0] is empty"),
    ],
)
def test_a_wrong_pair_is_told(pair_url: str, texts: list[Any], sentence: str) -> None:
    status, detail = problem_of(raw(pair_url, post(json.dumps({"texts": texts}).encode())))
    assert status == 422
    assert sentence in detail


def test_other_mistakes_in_http(url: str) -> None:
    good = b'{"texts": ["late"]}'
    assert problem_of(raw(url, b"GET /nothing HTTP/1.1\r\nHost: shoal\r\n\r\n"))[0] == 404
    assert problem_of(raw(url, b"GET /v1/classify HTTP/1.1\r\nHost: shoal\r\n\r\n"))[0] == 405
    assert raw(url, b"GET /v1/classify HTTP/1.1\r\nHost: shoal\r\n\r\n")[1]["allow"] == "POST"
    for coding in ("gzip", "identity, GZIP", "identity\r\nContent-Encoding: gzip"):
        assert problem_of(raw(url, post(good, f"Content-Encoding: {coding}")))[0] == 415
    for coding in ("Identity", "", "identity, IDENTITY"):
        assert raw(url, post(good, f"Content-Encoding: {coding}"))[0] == 200
    assert problem_of(raw(url, b"GET /static-offline-docs/%00 HTTP/1.1\r\nHost: shoal\r\n\r\n"))[0] == 404
    for header in ("X-Request-Id: \xff\xfe", "X-Request-Timeout-Seconds: \xff", "serve_multiplexed_model_id: \xff"):
        assert raw(url, post(good, header))[0] == 200
    assert raw(url, post(good, "Content-Type: text/plain; charset=latin-1"))[0] == 200


def test_nul_and_odd_characters_are_text(url: str) -> None:
    texts = ["late\x00again", "\U0001f6eb", "\u200b\u202e late", "e\u0301", "\ufffd\uffff"]
    response = httpx.post(f"{url}/v1/classify", json={"texts": texts})
    assert response.status_code == 200
    assert len(response.json()["results"]) == 5


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as client:
        yield client


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["texts", "a", ""]), inner, max_size=3),
    max_leaves=15,
)


@given(
    body=st.binary(max_size=60)
    | JSON.map(lambda value: json.dumps(value).encode())
    | JSON.map(lambda value: json.dumps({"texts": value}).encode())
)
@settings(max_examples=150, deadline=None)
def test_nothing_that_is_sent_makes_the_server_fail(client: httpx.Client, body: bytes) -> None:
    response = client.post("/v1/classify", content=body)
    if response.status_code == 200:
        json.loads(response.content, parse_constant=pytest.fail)
    else:
        assert response.status_code in (400, 422)
        problem_of((response.status_code, dict(response.headers), response.content))


def test_a_huge_body_is_refused_before_it_is_sent(url: str) -> None:
    started = time.monotonic()
    status, headers, _ = response = raw(url, post(b"", length=100_000_000))
    assert problem_of(response)[0] == status == 413
    assert headers["connection"] == "close"
    assert time.monotonic() - started < SETTINGS.body_timeout_s


def test_a_huge_body_of_unknown_length_is_refused_as_it_comes(url: str) -> None:
    def chunks() -> Iterator[bytes]:
        sent = 0
        while sent < 100_000_000:
            yield b"x" * 10_000
            sent += 10_000

    try:
        status = httpx.post(f"{url}/v1/classify", content=chunks()).status_code
    except httpx.TransportError:  # it was still sending when the connection was closed
        status = 413
    assert status == 413
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}


def test_a_slow_client_is_told_and_holds_nobody_up(url: str) -> None:
    answers: list[int] = []

    def slow() -> None:
        answers.append(problem_of(raw(url, post(b'{"texts"', length=100), (0.3, b": "), (0.4, b"[")))[0])

    threads = [threading.Thread(target=slow) for _ in range(20)]
    for thread in threads:
        thread.start()
    assert httpx.post(f"{url}/v1/classify", json={"texts": ["late"]}, timeout=5).status_code == 200
    for thread in threads:
        thread.join()
    assert answers == [408] * 20


def test_a_full_queue_is_429_with_retry_after(engine: Engine) -> None:
    gate = threading.Event()
    compute = engine.forward

    class Stalled:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def forward(self, batch: Any) -> Any:
            gate.wait(10)
            return compute(batch)

    statuses: list[int] = []
    with running(Stalled(), ServeSettings(max_queued=2)) as url:  # type: ignore[arg-type]

        def ask() -> None:
            statuses.append(httpx.post(f"{url}/v1/classify", json={"texts": ["late"]}, timeout=20).status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while "shoal_queued_requests" not in (page := httpx.get(f"{url}/metrics").text) or "} 2.0" not in page:
            assert time.monotonic() < deadline
        status, headers, _ = response = raw(url, post(b'{"texts": ["late"]}'))
        assert problem_of(response)[0] == status == 429
        assert int(headers["retry-after"]) >= 1
        gate.set()
        for thread in threads:
            thread.join()
    assert statuses == [200, 200]


def test_a_request_takes_its_place_before_its_texts_are_read_and_gives_it_up(engine: Engine) -> None:
    """Reading long texts is work too: it counts, others get their turn, and it ends when the client has gone."""
    gate, reading, calls = threading.Event(), threading.Event(), list[int]()

    class SlowReader:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def encode(self, texts: Any, pairs: Any = None) -> Any:
            if len(texts[0]) > 10_000:
                calls.append(len(texts))
                reading.set()
                assert gate.wait(10)
            return engine.encode(texts, pairs)

    settings = SETTINGS.model_copy(update={"max_body_bytes": 1_000_000})
    gateway = build_gateway(SlowReader(), settings, name="small", version="f00d")  # type: ignore[arg-type]

    async def ask(texts: list[str]) -> int:
        transport = httpx.ASGITransport(gateway)
        async with httpx.AsyncClient(transport=transport, base_url="http://shoal") as asking:
            return (await asking.post("/v1/classify", json={"texts": texts})).status_code

    async def run() -> None:
        long = asyncio.create_task(ask(["late bag " * 2000] * 8))
        await asyncio.to_thread(reading.wait, 10)
        assert gateway.state.batcher.queued == 1
        assert await ask(["late " * 500]) == 200
        long.cancel()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert gateway.state.batcher.queued == 0

    asyncio.run(run())
    assert calls == [1]


def test_what_the_model_is(url: str) -> None:
    about = httpx.get(f"{url}/v1/model").json()
    assert (about["name"], about["version"], about["max_length"], about["pair"]) == ("small", "f00d", 32, False)
    assert about["labels"][1] == {"name": "topics", "classes": ["bag", "delay", "food", "price"], "multi": True}
    assert about["metrics"] == {"accuracy": 0.9, "loss": None}
    assert about["lineage"] == {"prepare": "abc"}


def test_documentation_needs_no_other_host(url: str) -> None:
    page = httpx.get(f"{url}/docs").text
    assert "swagger" in page
    assert "https://" not in page
    assert httpx.get(f"{url}/static-offline-docs/swagger-ui-bundle.js").status_code == 200
    schema = httpx.get(f"{url}/openapi.json").json()
    body = schema["paths"]["/v1/classify"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["texts"]["maxItems"] == 8


def test_metrics_count_what_was_asked(engine: Engine) -> None:
    with running(engine, SETTINGS) as url:
        httpx.post(f"{url}/v1/classify", json={"texts": ["late", "bag " * 60]})
        httpx.post(f"{url}/v1/classify", json={"texts": []})
        samples = dict(
            line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")
        )
    own = 'model="small",replica="local"'
    assert samples[f'shoal_requests_total{{{own},status="200",version="f00d"}}'] == "1.0"
    assert samples[f'shoal_requests_total{{{own},status="422",version="f00d"}}'] == "1.0"
    assert samples[f'shoal_texts_total{{{own},version="f00d"}}'] == "2.0"
    assert samples[f'shoal_truncated_texts_total{{{own},version="f00d"}}'] == "1.0"
    assert samples[f'shoal_request_seconds_count{{{own},version="f00d"}}'] == "1.0"
    assert samples[f'shoal_queued_requests{{{own},version="f00d"}}'] == "0.0"
    assert samples[f'shoal_queue_tokens{{{own},version="f00d"}}'] == "0.0"
    assert samples[f'shoal_queue_wait_seconds_count{{{own},version="f00d"}}'] == "1.0"
    assert 0 < float(samples[f'shoal_queue_wait_seconds_sum{{{own},version="f00d"}}']) < 10
    batched, real, padding = (
        float(samples[f'shoal_{name}{{{own},version="f00d"}}'])
        for name in ("batch_tokens_sum", "tokens_total", "padding_tokens_total")
    )
    assert batched == real + padding > 0
    assert padding == 0
    assert samples[f'shoal_min_replicas{{{own},version="f00d"}}'] == "1.0"
    (info,) = (name for name in samples if name.startswith("shoal_build_info{"))
    assert {'engine="torch"', 'precision="fp32"', 'device="cpu"'} <= set(info[17:-1].split(","))


def test_long_texts_are_read_in_windows_where_asked_for(tmp_path: Path) -> None:
    engine = load_torch_engine(make_classifier(tmp_path / "single", (SENTIMENT,)), precision="fp32")
    long = " ".join(["late", "lovely", "bag", "food"][number % 4] for number in range(70))
    (windows,) = engine.encode_windows([long], 16)
    assert [len(each.ids) for each in windows[:-1]] == [32] * (len(windows) - 1)
    logits = engine.logits(windows)
    for way, joined in (("mean", logits.mean(axis=0)), ("max", logits.max(axis=0))):
        with running(engine, ServeSettings(long_texts=way, max_windows=16)) as url:
            short, found = httpx.post(f"{url}/v1/classify", json={"texts": ["late", long]}).json()["results"]
        assert (short["windows"], short["truncated"]) == (1, False)
        assert (found["windows"], found["truncated"]) == (len(windows), False)
        said = found["labels"]["sentiment"]["probabilities"]
        assert list(said.values()) == pytest.approx(list(np.exp(joined) / np.exp(joined).sum()), abs=1e-5)
    with running(engine, ServeSettings(long_texts="mean", max_windows=2)) as url:
        (found,) = httpx.post(f"{url}/v1/classify", json={"texts": [long]}).json()["results"]
    assert (found["windows"], found["truncated"]) == (2, True)
    pairs = load_torch_engine(make_classifier(tmp_path / "pair", pair=True), precision="fp32")
    with pytest.raises(InputError, match=r"serve\.long_texts is max, but the classifier takes pairs"):
        build_gateway(pairs, ServeSettings(long_texts="max"), name="small", version="f00d")


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "soon", "9999999999"])
def test_a_timeout_is_whole_milliseconds(url: str, given: str) -> None:
    response = httpx.post(f"{url}/v1/classify", json={"texts": ["late"]}, headers={"X-Request-Timeout-Ms": given})
    assert response.status_code == 400
    assert "X-Request-Timeout-Ms must be a whole number of milliseconds" in response.json()["detail"]


def test_a_client_that_waits_long_enough_is_answered(url: str) -> None:
    response = httpx.post(f"{url}/v1/classify", json={"texts": ["late"]}, headers={"X-Request-Timeout-Ms": "5000"})
    assert response.status_code == 200


def test_no_class_is_answered_below_the_threshold(engine: Engine) -> None:
    texts = [*CORPUS, "late", "food", "bag bag bag", "crew"]
    likeliest = [max(each.labels["sentiment"].probabilities.values()) for each in engine.classify(texts)]
    threshold = sorted(likeliest)[len(texts) // 2]
    for wanted, other in (({"below": 0.5}, None), ({"below": 0.5, "label": "other"}, "other")):
        with running(engine, ServeSettings(abstain=wanted), thresholds={"sentiment": threshold}) as url:
            results = httpx.post(f"{url}/v1/classify", json={"texts": texts}).json()["results"]
        for found, plain, likely in zip(results, engine.classify(texts), likeliest, strict=True):
            said = found["labels"]["sentiment"]
            assert said["label"] == (plain.labels["sentiment"].label if likely >= threshold else other)
            assert len(said["probabilities"]) == 3
            assert isinstance(found["labels"]["topics"]["label"], list)
