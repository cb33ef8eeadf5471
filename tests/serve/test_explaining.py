"""Explanations over real HTTP: beside classifying, never in its way."""

import asyncio
import functools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from upath import UPath

from models.engine import Engine
from models.explaining import Attribution, Explainer, Explanation, UnexplainableError
from models.settings import InputError
from models.torch_engine import load_torch_engine
from serve.gateway import build_gateway
from serve.model import ServedModel
from serve.settings import ServeSettings
from tests.serve.endpoint import post, problem_of, raw, running
from tests.small_classifiers import SENTIMENT, TOPICS, make_classifier

SETTINGS = ServeSettings()
TEMPERATURE = {"sentiment": 2.0}
PATH = "/v1/explain"
FOUND = Explanation(
    text="late",
    pair=None,
    column="sentiment",
    label="negative",
    probability=0.75,
    words=(Attribution("late", "text", 0, 4, 1.23456789),),
    total=1.23456789,
    difference=1.2,
    error=0.03456789,
    relative_error=0.0288,
    steps=16,
    truncated=False,
    tokens=3,
)


class Gated:
    """An explainer that answers when it is let, and notes the texts that it was asked for and those it gave up."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun: list[str] = []
        self.given_up: list[str] = []

    def explain(self, text: str, *, before_batch: Callable[[], None], **_: Any) -> Explanation:
        self.begun.append(text)
        assert self.gate.wait(10)
        try:
            before_batch()
        except CancelledError:
            self.given_up.append(text)
            raise
        return FOUND


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load_torch_engine(folder, precision="fp32", temperature=TEMPERATURE, threads=1)


@pytest.fixture(scope="module")
def url(folder: Path, engine: Engine) -> Iterator[str]:
    model = ServedModel("small", "f00d", UPath(folder), temperature=TEMPERATURE)
    with running(engine, SETTINGS, explainer=functools.partial(model.load_explainer, SETTINGS)) as url:
        yield url


@pytest.fixture(scope="module")
def pair_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_classifier(tmp_path_factory.mktemp("pair"), (SENTIMENT, TOPICS), pair=True)
    with running(load_torch_engine(folder, precision="fp32"), SETTINGS, explainer=lambda: Explainer(folder)) as url:
        yield url


def test_the_answer_is_the_explainers(url: str, folder: Path) -> None:
    expected = Explainer(folder, TEMPERATURE).explain("The  flight was late!")
    response = httpx.post(url + PATH, json={"text": "The  flight was late!"})
    assert response.status_code == 200
    told = response.json()
    assert (told.pop("model"), told.pop("version")) == ("small", "f00d")
    assert set(told) == set(asdict(expected))
    assert told["text"] == "The flight was late!"
    assert (told["pair"], told["column"], told["label"]) == (None, "sentiment", expected.label)
    assert [told["text"][word["start"] : word["end"]] for word in told["words"]] == [
        "The",
        "flight",
        "was",
        "late",
        "!",
    ]
    for word, other in zip(told["words"], expected.words, strict=True):
        assert (word["text"], word["source"]) == (other.text, "text")
        assert word["attribution"] == pytest.approx(other.attribution, abs=1e-4)
    for name in ("total", "difference", "probability"):
        assert told[name] == pytest.approx(getattr(expected, name), abs=1e-4)
    assert told["relative_error"] < 0.05
    classified = httpx.post(f"{url}/v1/classify", json={"texts": ["The  flight was late!"]}).json()["results"][0]
    assert told["probability"] == pytest.approx(max(classified["labels"]["sentiment"]["probabilities"].values()))
    other = httpx.post(url + PATH, json={"text": "late", "label": "neutral", "column": None}).json()
    assert other["label"] == "neutral"


def test_a_pair_is_explained_with_its_partner(pair_url: str) -> None:
    body = {"text": "The flight", "pair": "Lovely crew", "column": "topics", "label": "food"}
    told = httpx.post(pair_url + PATH, json=body).json()
    assert (told["text"], told["pair"], told["column"], told["label"]) == tuple(body.values())
    assert [(word["text"], word["source"]) for word in told["words"]] == [
        ("The", "text"),
        ("flight", "text"),
        ("Lovely", "pair"),
        ("crew", "pair"),
    ]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "cannot be read as JSON in UTF-8"),
        (b'{"text": "\xff"}', 400, "cannot be read as JSON in UTF-8"),
        (b'{"text": "\\ud800"}', 422, "surrogate"),
        (b"[]", 422, "body must be an object, not a list"),
        (b"{}", 422, 'The field text is missing; send {"text": "..."}.'),
        (b'{"texts": ["late"]}', 422, "The field text is missing"),
        (b'{"text": "late", "steps": 3}', 422, "steps is no field of a request"),
        (b'{"text": 3}', 422, "text must be a string, not a number"),
        (b'{"text": null}', 422, "text must be a string, not null"),
        (b'{"text": "late", "label": ["negative"]}', 422, "label must be a string, not a list"),
        (b'{"text": " \\n"}', 422, "text is empty"),
        (b'{"text": "late", "pair": "late"}', 422, "pair must be left out"),
        (b'{"text": "late", "column": "mood"}', 422, "no label column 'mood'; there is sentiment."),
        (b'{"text": "late", "label": "sad"}', 422, "'sad'; its classes are negative, neutral and positive."),
    ],
)
def test_mistakes_are_told_in_one_sentence(url: str, body: bytes, status: int, sentence: str) -> None:
    found, detail = problem_of(raw(url, post(body, path=PATH)))
    assert (found, sentence in detail) == (status, True), detail


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"text": "late", "column": "topics"}, "The field pair is missing, since the model takes pairs"),
        ({"text": "late", "pair": " ", "column": "topics"}, "pair is empty"),
        ({"text": "late", "pair": "crew"}, "column is missing: the classifier has several, sentiment and topics"),
        ({"text": "late", "pair": "crew", "column": "topics", "label": "negative"}, "bag, delay, food and price."),
    ],
)
def test_mistakes_with_pairs_and_columns_are_told(pair_url: str, body: dict[str, str], sentence: str) -> None:
    status, detail = problem_of(raw(pair_url, post(json.dumps(body).encode(), path=PATH)))
    assert (status, sentence in detail) == (422, True), detail


def test_other_mistakes_in_http(url: str) -> None:
    assert problem_of(raw(url, f"GET {PATH} HTTP/1.1\r\nHost: shoal\r\n\r\n".encode()))[0] == 405
    assert problem_of(raw(url, post(b'{"text": "late"}', "Content-Encoding: gzip", path=PATH)))[0] == 415


def test_beyond_the_queue_it_is_429_and_nobody_else_waits(engine: Engine) -> None:
    gated = Gated()
    with running(engine, ServeSettings(explain_queue=1), explainer=lambda: gated) as url, ThreadPoolExecutor(2) as pool:
        ask = functools.partial(httpx.post, url + PATH, timeout=20)
        first = pool.submit(ask, json={"text": "first"})
        wait_until(lambda: gated.begun == ["first"])
        second = pool.submit(ask, json={"text": "second"})
        wait_until(lambda: "} 2.0" in httpx.get(f"{url}/metrics").text)
        status, headers, _ = response = raw(url, post(b'{"text": "third"}', path=PATH))
        assert problem_of(response) == (429, f"Too many explanations wait; try again in {headers['retry-after']} s.")
        assert (status, int(headers["retry-after"]) >= 1) == (429, True)
        assert httpx.post(f"{url}/v1/classify", json={"texts": ["late"]}).status_code == 200
        assert problem_of(raw(url, post(b'{"text": ""}', path=PATH)))[0] == 422
        gated.gate.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]
        assert gated.begun == ["first", "second"]
        assert ask(json={"text": "fourth"}).json()["words"][0]["attribution"] == 1.234568
        samples = dict(
            line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")
        )
    own = 'model="small",replica="local"'
    counted = {
        status: samples.get(f'shoal_requests_total{{{own},status="{status}",version="f00d"}}') for status in (429, 422)
    }
    assert counted == {429: "1.0", 422: "1.0"}
    assert samples[f'shoal_requests_total{{{own},status="200",version="f00d"}}'] == "4.0"
    assert samples[f'shoal_explanation_seconds_count{{{own},version="f00d"}}'] == "3.0"
    assert samples[f'shoal_request_seconds_count{{{own},version="f00d"}}'] == "1.0"


def test_who_has_gone_is_not_explained(engine: Engine) -> None:
    gated = Gated()
    gateway = build_gateway(engine, SETTINGS, name="small", version="f00d", explainer=lambda: gated)  # type: ignore[arg-type, return-value]

    async def ask(client: httpx.AsyncClient, text: str) -> int:
        return (await client.post(PATH, json={"text": text})).status_code

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://shoal") as client:
            first, second = (asyncio.create_task(ask(client, text)) for text in ("first", "second"))
            await asyncio.to_thread(wait_until, lambda: bool(gated.begun))
            for each in (first, second):
                each.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await each
            gated.gate.set()
            assert await ask(client, "third") == 200

    asyncio.run(run())
    assert (gated.begun, gated.given_up) == (["first", "third"], ["first"])


def test_the_explainer_is_loaded_at_the_first_explanation_and_nobody_else_waits(engine: Engine) -> None:
    gated, loads = Gated(), list[str]()
    loading, loaded = threading.Event(), threading.Event()
    gated.gate.set()

    def load() -> Gated:
        loads.append(threading.current_thread().name)
        loading.set()
        assert loaded.wait(10)
        if len(loads) == 1:
            raise InputError("the store is away.")
        return gated

    with running(engine, SETTINGS, explainer=load) as url, ThreadPoolExecutor(1) as pool:
        assert httpx.post(f"{url}/v1/classify", json={"texts": ["late"]}).status_code == 200
        assert loads == []
        first = pool.submit(httpx.post, url + PATH, json={"text": "late"}, timeout=20)
        assert loading.wait(10)
        assert httpx.post(f"{url}/v1/classify", json={"texts": ["late"]}).status_code == 200
        loaded.set()
        failed = first.result()
        assert (failed.status_code, failed.headers["content-type"]) == (500, "application/problem+json")
        assert failed.headers["x-request-id"] == failed.json()["request_id"]
        for _ in range(2):
            assert httpx.post(url + PATH, json={"text": "late"}).status_code == 200
    assert len(loads) == 2
    assert all(name.startswith("explain") for name in loads)


@pytest.mark.parametrize(
    ("error", "status"), [(UnexplainableError("t5 cannot."), 501), (InputError("no number."), 422)]
)
def test_what_cannot_be_explained_is_told(engine: Engine, error: InputError, status: int) -> None:
    class Refusing:
        def explain(self, **_: Any) -> Explanation:
            raise error

    with running(engine, SETTINGS, explainer=Refusing) as url:
        assert problem_of(raw(url, post(b'{"text": "late"}', path=PATH))) == (status, str(error))


def test_the_route_can_be_turned_off(engine: Engine, url: str) -> None:
    assert PATH in httpx.get(f"{url}/openapi.json").json()["paths"]
    with running(engine, ServeSettings(explain=False), explainer=Gated) as off:
        assert problem_of(raw(off, post(b'{"text": "late"}', path=PATH)))[0] == 404
        assert PATH not in httpx.get(f"{off}/openapi.json").json()["paths"]


def test_a_replica_does_not_import_torch_before() -> None:
    code = "import sys, serve.gateway, serve.model, models.onnx_engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
