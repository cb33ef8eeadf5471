"""A guarded endpoint over real HTTP: who is let in where, how often, and what every answer tells a browser."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from upath import UPath

from cluster.store import ClusterError
from models.engine import Engine
from models.settings import InputError
from models.torch_engine import load_torch_engine
from serve.access import SCOPES, is_open, scope_of
from serve.direct import PastRay
from serve.gateway import build_gateway
from serve.guard import SETTINGS_VARIABLE, STORE_VARIABLE, Guard, make_guard, network_of, process_guard
from serve.keys import KEYS, create_key, revoke_key
from serve.known_keys import KnownKeys
from serve.limits import RequestLimits, middlewares
from serve.rates import TokenBuckets
from serve.refusals import on_refusal
from serve.request_log import RequestLog
from serve.security import Security
from serve.security_settings import RateSettings
from serve.settings import ServeSettings
from tests.serve.endpoint import post, problem_of, raw, running
from tests.serve.test_rates import Clock
from tests.small_classifiers import make_classifier

SETTINGS = ServeSettings(keys=True, max_body_bytes=20_000, body_timeout_s=0.5)
GOOD = b'{"texts": ["late"]}'


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_torch_engine(make_classifier(tmp_path_factory.mktemp("single")), precision="fp32")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> UPath:
    return UPath(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def keys(store: UPath) -> dict[str, str]:
    """A key for each scope."""
    return {scope: create_key(store, scope, [scope])[1] for scope in SCOPES}


@pytest.fixture(scope="module")
def known(store: UPath, keys: dict[str, str]) -> KnownKeys:
    """What the endpoint knows of them; read anew when told to, not by time."""
    return KnownKeys(store)


@pytest.fixture(scope="module")
def clock() -> Clock:
    clock = Clock()
    clock.now = time.time()
    return clock


@pytest.fixture(scope="module")
def url(engine: Engine, known: KnownKeys, clock: Clock) -> Iterator[str]:
    with running(engine, SETTINGS, Guard(SETTINGS, known, buckets=TokenBuckets(clock), now=clock)) as url:
        yield url


def asked(url: str, key: str, body: bytes = GOOD, path: str = "/v1/classify") -> tuple[int, dict[str, str], bytes]:
    return raw(url, post(body, f"Authorization: Bearer {key}", path=path))


def test_a_valid_key_is_let_in_by_either_header(url: str, keys: dict[str, str]) -> None:
    for header in (
        f"Authorization: Bearer {keys['classify']}",
        f"authorization:  bearer  {keys['classify']} ",
        f"X-API-Key: {keys['classify']}",
        f"Authorization: Basic eDp5\r\nX-API-Key: {keys['classify']}",
    ):
        assert raw(url, post(GOOD, header))[0] == 200


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("X-Nothing: x", "This needs an API key: send the header `Authorization: Bearer ...`."),
        ("Authorization: Bearer", "This needs an API key"),
        ("Authorization: Basic {key}", "This needs an API key"),
        ("X-API-Key:", "This needs an API key"),
        ("Authorization: Bearer {key}x", "This is no valid API key."),
        ("Authorization: Bearer shoal_{id}_", "This is no valid API key."),
        ("Authorization: Bearer shoal_{id}", "This is no valid API key."),
        ("Authorization: Bearer shoal_00000000_{secret}", "This is no valid API key."),
        ("Authorization: Bearer {secret}", "This is no valid API key."),
        ("Authorization: Bearer eyJhbGciOiJub25lIn0.e30.", "This is no valid API key."),
        ("X-API-Key: {key} {key}", "This is no valid API key."),
        ("X-API-Key: \xff\xfe", "This is no valid API key."),
        ("X-API-Key: shoal_" + "x" * 10_000, "This is no valid API key."),
    ],
)
def test_others_are_told_401(url: str, keys: dict[str, str], header: str, sentence: str) -> None:
    key = keys["classify"]
    _, its_id, secret = key.split("_", 2)
    response = raw(url, post(GOOD, header.format(key=key, id=its_id, secret=secret)))
    assert problem_of(response)[0] == 401
    assert problem_of(response)[1].startswith(sentence)
    shown = "no valid" in sentence
    assert response[1]["www-authenticate"] == ('Bearer error="invalid_token"' if shown else "Bearer")
    assert secret.encode() not in response[2]


PATHS = {
    "/v1/classify": {"classify", "admin"},
    "/predict": {"classify", "admin"},
    "/v1/explain": {"explain", "admin"},
    "/metrics": {"metrics", "admin"},
    "/info": set(SCOPES),
    "/v1/model": set(SCOPES),
    "/nowhere": set(SCOPES),
    "/v1/classify/": set(SCOPES),
    "/docs/x": set(SCOPES),
    "/static-offline-docs": set(SCOPES),
}
OPEN = ["/healthz", "/health", "/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css", "/page/page.js"]


@pytest.mark.parametrize("path", PATHS)
def test_each_path_asks_for_its_scope(url: str, keys: dict[str, str], path: str) -> None:
    for method in ("GET", "POST"):
        for scope in SCOPES:
            request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {keys[scope]}\r\nContent-Length: 0\r\n\r\n"
            status, headers, body = response = raw(url, request.encode())
            if scope in PATHS[path]:
                assert status in (200, 400, 404, 405), body
            else:
                assert status == 403
                wanted = scope_of(path)
                assert problem_of(response)[1].endswith(f"it needs the scope {wanted}.")
                assert headers["www-authenticate"] == f'Bearer error="insufficient_scope", scope="{wanted}"'
        assert problem_of(raw(url, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()))[0] == 401


def test_the_page_for_people_is_open_and_classifying_at_its_address_is_not(url: str, keys: dict[str, str]) -> None:
    for method in ("GET", "HEAD"):
        assert httpx.request(method, f"{url}/").status_code == 200
    for method in ("POST", "PUT", "OPTIONS"):
        assert httpx.request(method, f"{url}/", json={"inputs": "late"}).status_code == 401
    for scope in SCOPES:
        status = asked(url, keys[scope], b'{"inputs": "late"}', "/")[0]
        assert status == (200 if scope in ("classify", "admin") else 403)


def test_health_and_documentation_are_open(url: str) -> None:
    for path in OPEN:
        assert httpx.get(url + path).status_code == 200
    for path in ("/static-offline-docs/../v1/model", "/static-offline-docs/%2e%2e/v1/model"):
        assert raw(url, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())[0] == 404
    for path in ("/v1/%63lassify", "//v1/classify", "http://x/v1/classify", "/healthz/../v1/classify"):
        assert raw(url, post(GOOD, path=path))[0] == 401


def test_every_route_is_known_to_the_scopes(engine: Engine) -> None:
    """A route that nobody thought of here is closed to those without a key, but open to any with one."""
    routes = [r for r in build_gateway(engine, SETTINGS, name="x", version="x").routes if isinstance(r, APIRoute)]
    assert len(routes) >= 9
    for route in routes:
        opened = route.path in OPEN or route.path.startswith("/page/") or (route.path == "/" and "GET" in route.methods)
        assert opened or route.path in PATHS or route.path == "/"
        for method in route.methods:
            assert is_open(method, route.path) == opened


def test_a_revoked_key_and_one_that_expired_open_nothing(
    url: str, store: UPath, known: KnownKeys, clock: Clock
) -> None:
    key, shown = create_key(store, "a", lifetime=timedelta(hours=1))
    assert asked(url, shown)[0] == 401
    known.read()
    assert asked(url, shown)[0] == 200
    assert key.expires is not None
    clock.now, before = key.expires.timestamp(), clock.now
    assert problem_of(asked(url, shown)) == (401, "The key has expired; get a new one.")
    clock.now = before
    assert asked(url, shown)[0] == 200
    revoke_key(store, key.id)
    known.read()
    assert problem_of(asked(url, shown)) == (401, "This API key was revoked; ask for a new one.")
    assert problem_of(asked(url, shown + "x")) == (401, "This is no valid API key.")


def test_keys_are_read_anew_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.known_keys.READ_EVERY_S", 0.01)
    store = UPath(tmp_path)
    known = KnownKeys(store)
    known.start()
    _, shown = create_key(store, "a")
    deadline = time.monotonic() + 10
    while not known._known:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert known.caller(shown.encode()).scopes == {"classify"}


def test_what_cannot_be_read_leaves_the_known_keys_valid(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = UPath(tmp_path / "store")
    store.mkdir()
    shown = create_key(store, "a")[1].encode()
    known = KnownKeys(store)
    document = (store / KEYS).read_text()
    (store / KEYS).write_text("{" + document)
    with caplog.at_level(logging.WARNING):
        known.read()
        known.read()
    assert known.caller(shown)
    (tmp_path / "store").rename(tmp_path / "away")
    known.read()
    assert known.caller(shown)
    assert [re.sub(r"/\S*/", "", each.message)[:24] for each in caplog.records] == ["keys.json is damaged: Inv"[:24]]
    assert "stay valid" in caplog.text
    (tmp_path / "away").rename(tmp_path / "store")
    (store / KEYS).write_text(document)
    known.read()
    assert "can be read again" in caplog.text
    assert shown.decode().split("_", 2)[2] not in caplog.text
    (store / KEYS).unlink()
    known.read()
    with pytest.raises(Exception, match="no valid API key"):
        known.caller(shown)
    (store / KEYS).write_text("damaged")
    with pytest.raises(ClusterError, match="is damaged"):
        KnownKeys(store)


def test_a_request_is_refused_before_its_body_is_read(url: str) -> None:
    started = time.monotonic()
    status, headers, _ = response = raw(url, post(b"", length=100_000_000))
    assert problem_of(response)[0] == status == 401
    assert headers["connection"] == "close"
    assert time.monotonic() - started < SETTINGS.body_timeout_s


def test_refusals_are_counted(engine: Engine, known: KnownKeys) -> None:
    told: list[int] = []

    def tell(status: int, seconds: float) -> None:
        told.append(status)

    on_refusal.append(tell)
    try:
        with running(engine, SETTINGS, Guard(SETTINGS, known)) as url:
            raw(url, post(GOOD))
            raw(url, post(b"", length=100_000_000))
    finally:
        on_refusal.remove(tell)
    assert told == [401, 401]


def test_a_rate_holds_for_each_key(engine: Engine, store: UPath, clock: Clock) -> None:
    first, second = (create_key(store, "a", ["admin"])[1] for _ in range(2))
    own = create_key(store, "own", ["classify"], rate=0.5)[1]
    settings = ServeSettings(keys=True, rate=RateSettings(requests_per_second=2, burst=3))
    guard = Guard(settings, KnownKeys(store), buckets=TokenBuckets(clock), now=clock)
    with running(engine, settings, guard) as url:
        assert [asked(url, first)[0] for _ in range(4)] == [200, 200, 200, 429]
        response = asked(url, first)
        assert problem_of(response) == (429, "That is more than 2 requests a second; try again in 1 s.")
        assert response[1]["retry-after"] == "1"
        assert asked(url, second)[0] == 200
        assert httpx.get(f"{url}/healthz").status_code == 200
        clock.now += 0.5
        assert [asked(url, first)[0] for _ in range(2)] == [200, 429]
        assert asked(url, own)[0] == 200
        assert asked(url, own)[1]["retry-after"] == "2"


def test_without_keys_a_rate_holds_for_each_address(engine: Engine, clock: Clock) -> None:
    settings = ServeSettings(rate=RateSettings(requests_per_second=1))
    guard = Guard(settings, buckets=TokenBuckets(clock), now=clock)
    with running(engine, settings, guard) as url:
        # HAProxy, on this machine, tells the client's address so.
        assert [raw(url, post(GOOD, "X-Forwarded-For: 192.0.2.7"))[0] for _ in range(2)] == [200, 429]
        assert raw(url, post(GOOD, "X-Forwarded-For: 192.0.2.8"))[0] == 200
        assert [raw(url, post(GOOD, f"X-Forwarded-For: 2001:db8:1:2::{n}"))[0] for n in (1, 2)] == [200, 429]
        assert raw(url, post(GOOD, "X-Forwarded-For: 2001:db8:1:3::1"))[0] == 200
        assert httpx.get(f"{url}/docs").status_code == 200
    assert network_of("::ffff:192.0.2.7") == "192.0.2.7"


def test_every_answer_tells_browsers_what_to_refuse(url: str, keys: dict[str, str]) -> None:
    answers = {
        200: asked(url, keys["classify"]),
        401: raw(url, post(GOOD)),
        403: asked(url, keys["metrics"]),
        404: asked(url, keys["classify"], path="/nowhere"),
        405: asked(url, keys["classify"], path="/v1/model"),
        413: asked(url, keys["classify"], b"x" * 30_000),
        422: asked(url, keys["classify"], b"{}"),
    }
    for status, (found, headers, _) in answers.items():
        assert found == status
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
        assert headers["content-security-policy"].startswith("default-src 'none';")
        assert not re.search(r"\d", headers.get("server", ""))
    static = httpx.get(f"{url}/static-offline-docs/swagger-ui.css")
    assert static.headers["x-content-type-options"] == "nosniff"
    assert "cache-control" not in static.headers


def test_the_documentations_page_runs_its_own_scripts_only(url: str) -> None:
    page = httpx.get(f"{url}/docs")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert page.headers.get_list("content-security-policy", split_commas=False) == [
        page.headers["content-security-policy"]
    ]
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert re.fullmatch(r"'self' 'sha256-[\w+/]{43}='", policy["script-src"])
    assert page.text.count("<script>") == 1
    # What a browser asks for: the page's own files are all there is.
    for address in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert httpx.get(url + address).status_code == 200


def test_the_openapi_document_says_which_keys_are_needed(url: str, engine: Engine) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert document["components"]["securitySchemes"]["apiKey"]["name"] == "X-API-Key"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            closed = not is_open(method.upper(), path)
            assert ("security" in operation) == closed
            assert ("401" in operation["responses"]) == closed
            assert ("403" in operation["responses"]) == (scope_of(path) is not None)
    with running(engine, ServeSettings()) as open_url:
        plain = httpx.get(f"{open_url}/openapi.json").json()
    assert "securitySchemes" not in plain["components"]


def test_what_comes_past_the_first_guard_meets_the_second(
    engine: Engine, known: KnownKeys, keys: dict[str, str]
) -> None:
    """Ray's own proxy hands requests to the application without the middleware around the replica's server."""
    gateway = build_gateway(engine, SETTINGS, name="small", version="f00d")
    guarded = Security(gateway, Guard(SETTINGS, known))

    async def ask(**headers: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://shoal") as client:
            return await client.get("/v1/model", headers=headers)

    assert asyncio.run(ask()).status_code == 401
    let_in = asyncio.run(ask(Authorization=f"Bearer {keys['explain']}"))
    assert let_in.status_code == 200
    assert let_in.headers["x-frame-options"] == "DENY"


def test_nobody_behind_the_guard_sees_a_key(known: KnownKeys, keys: dict[str, str]) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["headers"])

    headers = [(b"x-api-key", keys["admin"].encode()), (b"authorization", b"Basic x"), (b"accept", b"*/*")]
    scope = {"type": "http", "method": "GET", "path": "/v1/model", "headers": headers, "client": None}
    asyncio.run(Security(app, Guard(SETTINGS, known))(scope, None, None))  # type: ignore[arg-type]
    assert seen == [[(b"accept", b"*/*")]]


def test_a_websocket_is_closed(known: KnownKeys) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        pytest.fail("it was let in")

    scope = {"type": "websocket", "path": "/v1/classify", "headers": []}
    asyncio.run(Security(app, Guard(SETTINGS, known))(scope, None, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_replica_finds_its_guard_in_the_environment(
    store: UPath, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SETTINGS_VARIABLE, SETTINGS.model_dump_json())
    monkeypatch.setenv(STORE_VARIABLE, str(store))
    process_guard.cache_clear()
    try:
        past, inner, outer, log = middlewares()
        assert (past.cls, inner.cls, outer.cls, log.cls) == (PastRay, RequestLimits, Security, RequestLog)
        guard = outer.kwargs["guard"]
        assert isinstance(guard, Guard)
        assert process_guard() is guard
        assert guard._keys is not None
        assert guard._keys.caller(keys["metrics"].encode()).scopes == {"metrics"}
    finally:
        process_guard.cache_clear()
    assert make_guard(ServeSettings(), None) is None
    with pytest.raises(InputError, match="was given no store"):
        make_guard(SETTINGS, None)


def test_no_secret_is_in_a_log(
    url: str, keys: dict[str, str], known: KnownKeys, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        for key in (*keys.values(), keys["admin"] + "x"):
            asked(url, key)
            asked(url, key, b"{", "/predict")
        known.read()
    for key in keys.values():
        assert key.split("_", 2)[2] not in caplog.text
    assert json.loads(asked(url, keys["classify"])[2])["results"]
