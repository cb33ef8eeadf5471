"""A request's id and its line in the log: what is told, of whom, and in which form."""

import asyncio
import json
import logging
import logging.handlers
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from upath import UPath

from models.engine import Engine
from models.torch_engine import load_torch_engine
from serve.gateway import build_gateway
from serve.guard import Guard, make_guard
from serve.keys import create_key
from serve.known_keys import KnownKeys
from serve.logs import JsonFormatter, log_into_replica_file, logger
from serve.request_log import RequestLines, RequestLog
from serve.requests import new_record
from serve.security import Security
from serve.security_settings import RateSettings
from serve.settings import ServeSettings
from tests.serve.endpoint import post, problem_of, raw, running
from tests.serve.test_explaining import wait_until
from tests.small_classifiers import SENTIMENT, TOPICS, make_classifier

GOOD = b'{"texts": ["the flight was late", "good crew ' + b"bag " * 60 + b'"]}'
SETTINGS = ServeSettings(max_body_bytes=2_000, max_texts=4, log_requests="all")
NUMBER = "212-555-0199"
USUAL = {"time", "level", "logger", "request_id", "method", "path", "status", "milliseconds"}
ABOUT = {"model", "version", "replica"}


class Lines(logging.Handler):
    """Keeps what a file would hold."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(JsonFormatter())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        assert "\n" not in text
        self.lines.append(json.loads(text))

    def of(self, name: str = "requests") -> list[dict[str, Any]]:
        return [line for line in self.lines if line["logger"] == f"shoal.{name}"]


@pytest.fixture
def lines() -> Iterator[Lines]:
    tree, kept = logging.getLogger("shoal"), Lines()
    level = tree.level
    tree.setLevel(logging.DEBUG)
    tree.addHandler(kept)
    yield kept
    tree.removeHandler(kept)
    tree.setLevel(level)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_torch_engine(make_classifier(tmp_path_factory.mktemp("single"), (SENTIMENT, TOPICS)), precision="fp32")


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with running(engine, SETTINGS) as url:
        yield url


@pytest.mark.parametrize("given_id", ["a", "7f0c-1", "!~", "x" * 128])
def test_an_id_is_echoed(url: str, given_id: str) -> None:
    for body, status in ((GOOD, 200), (b"{", 400)):
        found, headers, answer = raw(url, post(body, f"X-Request-ID: {given_id}"))
        assert (found, headers["x-request-id"]) == (status, given_id)
        assert status == 200 or json.loads(answer)["request_id"] == given_id


@pytest.mark.parametrize("header", ["X-Other: 1", "X-Request-ID: ", "X-Request-ID: a b", "X-Request-ID: " + "x" * 129,
                                    "X-Request-ID: caf\xe9", "X-Request-ID: a\tb"])  # fmt: skip
def test_another_one_is_made(url: str, header: str) -> None:
    ids = {raw(url, post(GOOD, header))[1]["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


@given(st.binary(max_size=140))
def test_an_id_is_always_visible_ascii(value: bytes) -> None:
    found = new_record({"headers": [(b"x-request-id", value)]}).id
    assert re.fullmatch("[!-~]{1,128}", found)
    proper = 0 < len(value) <= 128 and all(0x21 <= byte <= 0x7E for byte in value)
    assert (found.encode() == value) == proper


def test_there_is_one_id_in_an_answer(url: str) -> None:
    import http.client

    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("GET", "/healthz")
    assert len(connection.getresponse().headers.get_all("X-Request-ID") or ()) == 1
    connection.close()


def test_refusals_of_all_layers_have_the_id(engine: Engine, tmp_path: Path, lines: Lines) -> None:
    store = UPath(tmp_path)
    shown = {scope: create_key(store, scope, [scope])[1] for scope in ("classify", "metrics", "admin")}
    settings = SETTINGS.model_copy(update={"keys": True, "rate": RateSettings(requests_per_second=0.001, burst=3)})
    own = "X-Request-ID: mine"

    def key(scope: str) -> str:
        return f"Authorization: Bearer {shown[scope]}"

    with running(engine, settings, Guard(settings, KnownKeys(store))) as url:
        responses = [
            raw(url, post(GOOD, own)),
            raw(url, post(GOOD, own, key("metrics"))),
            raw(url, post(b"x" * 3_000, own, key("classify"))),
            raw(url, post(b"{}", own, key("classify"))),
            raw(url, post(b'{"inputs": []}', own, key("classify"), path="/predict")),
            raw(url, post(GOOD, own, key("classify"))),
            raw(url, post(GOOD, own, key("admin"), path="/nothing")),
            raw(url, post(GOOD, own, key("admin"), path="/healthz")),
        ]
    told = [problem_of(each)[0] for each in responses]
    assert told == [401, 403, 413, 422, 422, 429, 404, 405]
    assert {json.loads(body)["request_id"] for _, _, body in responses} == {"mine"}
    assert {headers["x-request-id"] for _, headers, _ in responses} == {"mine"}
    found = lines.of()
    assert [line["status"] for line in found] == told
    assert all(set(line) - {"client"} == USUAL | ABOUT | {"problem"} for line in found)
    assert found[2]["problem"] == "Request Entity Too Large"
    ids = {scope: f"key {each.split('_')[1]}" for scope, each in shown.items()}
    assert [line.get("client") for line in found] == [
        None, ids["metrics"], *[ids["classify"]] * 4, ids["admin"], None,
    ]  # fmt: skip
    assert not [secret for each in shown.values() if (secret := each.split("_")[2]) in str(lines.lines)]


def test_what_comes_by_rays_own_proxy_has_id_and_line_too(engine: Engine, tmp_path: Path, lines: Lines) -> None:
    settings = SETTINGS.model_copy(update={"keys": True})
    written = RequestLines("all")
    gateway = build_gateway(engine, settings, name="small", version="f00d")
    written.describe(gateway.routes, model="small", version="f00d", replica="r1")
    app = RequestLog(Security(gateway, Guard(settings, KnownKeys(UPath(tmp_path)))), written)

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shoal") as client:
            return await client.post("/v1/classify", content=GOOD, headers={"X-Request-ID": "mine"})

    answer = asyncio.run(asked())
    assert (answer.status_code, answer.headers["x-request-id"], answer.json()["request_id"]) == (401, "mine", "mine")
    assert [(line["request_id"], line["status"]) for line in lines.of()] == [("mine", 401)]


def test_a_line_tells_of_an_answer(engine: Engine, lines: Lines) -> None:
    with running(engine, SETTINGS, replica="r1") as url:
        raw(url, post(GOOD, "X-Request-ID: mine", "X-Secret: secret"))
        raw(url, post(b'{"inputs": "late"}', path="/predict?late"))
        raw(url, post(b'{"inputs": ["late"]}', path="/"))
        raw(url, b"GET /healthz HTTP/1.1\r\nHost: shoal\r\n\r\n")
        raw(url, b"PROPFIND /who/is/it HTTP/1.1\r\nHost: shoal\r\n\r\n")
    first, second, third, health, unknown = lines.of()
    counted = {"texts", "tokens", "truncated", "queue_milliseconds"}
    assert set(first) == set(third) == USUAL | ABOUT | counted
    assert (first["method"], first["path"], first["status"], first["level"]) == ("POST", "/v1/classify", 200, "INFO")
    assert (first["model"], first["version"], first["replica"]) == ("small", "f00d", "r1")
    answers = engine.classify(json.loads(GOOD)["texts"])
    assert (first["texts"], first["tokens"], first["truncated"]) == (2, sum(each.tokens for each in answers), 1)
    assert 0 <= first["queue_milliseconds"] <= first["milliseconds"] < 60_000
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["time"])
    assert abs(datetime.fromisoformat(first["time"]).timestamp() - datetime.now().timestamp()) < 60
    assert (second["path"], second["texts"], third["path"]) == ("/predict", 1, "/")
    assert set(health) == USUAL | ABOUT
    assert (unknown["method"], unknown["path"], unknown["status"]) == ("(other)", "(other)", 404)
    assert not [word for word in ("secret", "late", "negative", "who") if word in str(lines.lines)]


@pytest.mark.parametrize(("which", "told"), [("none", []), ("errors", [429, 500]), ("all", [200, 422, 404, 429, 500])])
def test_what_is_told_can_be_chosen(
    engine: Engine, lines: Lines, which: str, told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ServeSettings().log_requests == "errors"
    settings = ServeSettings(log_requests=which, rate=RateSettings(requests_per_second=0.001, burst=3))  # type: ignore[arg-type]
    with running(engine, settings, make_guard(settings, None)) as url:
        for body, path in ((GOOD, "/v1/classify"), (b"{}", "/v1/classify"), (GOOD, "/nothing"), (GOOD, "/v1/classify")):
            raw(url, post(body, path=path))
    with running(engine, ServeSettings(log_requests=which)) as url:  # type: ignore[arg-type]
        monkeypatch.setattr(engine, "encode", broken)
        raw(url, post(GOOD))
    assert [line["status"] for line in lines.of()] == told
    assert len(lines.of("errors")) == 1


def broken(texts: list[str], pairs: list[str] | None = None) -> None:
    try:
        raise KeyError(texts[0])
    except KeyError as error:
        raise ValueError(f"no memory left for Zuse in {texts!r}, call {NUMBER}") from error


def test_a_failure_is_told_without_what_was_asked(
    engine: Engine, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "encode", broken)
    body = json.dumps({"texts": ["Zuse m\u00fcde: \u5f20\u4e09"]}).encode()
    with running(engine, SETTINGS) as url:
        response = raw(url, post(body, "X-Request-ID: mine"))
    assert problem_of(response) == (500, "The server failed at this request; its log says why.")
    (line,) = lines.of("errors")
    assert (line["request_id"], line["level"]) == ("mine", "ERROR")
    trace = line["exception"]
    assert trace.count("Traceback") == 2
    assert 'raise ValueError(f"no memory' in trace
    assert "builtins.KeyError" in trace
    assert "builtins.ValueError: no memory left for _ in" in trace
    assert not [word for word in ("Zuse m", "m\u00fcde", "\u00fc", "\u5f20", "555") if word in trace]
    assert lines.of()[0]["status"] == 500


@contextmanager
def as_in_a_replica(file: Path) -> Iterator[logging.Logger]:
    """Ray's logger and ours as they are before and after; Ray's writes to the file as in a replica."""
    ray, tree = logging.getLogger("ray.serve"), logging.getLogger("shoal")
    others = map(logging.getLogger, ("asyncio", "concurrent.futures", "uvicorn.error"))
    touched = (ray, tree, *others)
    before = [(each, each.handlers[:], each.filters[:], each.propagate, each.level) for each in touched]
    target = logging.handlers.RotatingFileHandler(file, maxBytes=10**6, backupCount=1)
    target.setFormatter(logging.Formatter("INFO %(asctime)s replica -- %(message)s"))
    ray.handlers, ray.propagate = [logging.handlers.MemoryHandler(1, target=target)], False
    ray.setLevel(logging.WARNING)
    try:
        yield ray
    finally:
        for each, handlers, filters, propagate, level in before:
            each.handlers, each.filters, each.propagate = handlers, filters, propagate
            each.setLevel(level)
        target.close()


def test_lines_are_whole_in_the_replicas_file(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "replica.log"
    # In this order: uvicorn, as it starts here, closes all handlers there are.
    with running(engine, SETTINGS) as url, as_in_a_replica(file) as ray:
        log_into_replica_file()
        log_into_replica_file()
        monkeypatch.setattr(engine, "encode", broken)
        raw(url, post(GOOD))
        wait_until(lambda: file.read_text().count("\n") == 2)
        logger("keys").warning("write to %s", "anna@example.com")
        ray.warning("%s waits", "anna@example.com")
        ray.info("not told")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["logger"] for line in found] == ["shoal.errors", "shoal.requests", "shoal.keys", "ray.serve"]
    assert [line.get("message") for line in found[2:]] == ["write to [EMAIL]", "[EMAIL] waits"]


def test_all_loggers_of_the_serving_code_are_masked() -> None:
    for file in Path("serve").glob("*.py"):
        if file.name not in ("logs.py", "app.py", "ingress.py"):  # the others are not in a replica
            assert "logging" not in file.read_text(), file
