"""Requests to the queue pass Ray's handling by, and lose nothing of it that their clients need."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.direct import Announced, PastRay, ready
from serve.limits import RequestLimits
from serve.request_log import RequestLines, RequestLog
from serve.requests import RequestRecord
from serve.security import Security
from tests.serve.endpoint import post


class Application:
    """Answers with the body, at once or when it is let; remembers what became of it."""

    def __init__(self, name: bytes, *, waits: bool = False) -> None:
        self.name = name
        self.waits = waits
        self.began = threading.Event()
        self.cancelled = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        self.began.set()
        try:
            if self.waits:
                await asyncio.sleep(20)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.name + b" " + message["body"]})


class Lines(RequestLines):
    """Keeps the statuses that it would write."""

    def __init__(self) -> None:
        super().__init__("none")
        self.statuses: list[int | None] = []

    def write(self, record: RequestRecord, method: str, path: str, seconds: float) -> None:
        self.statuses.append(record.status)


@contextmanager
def served(ray: ASGIApp, ours: ASGIApp | None, lines: RequestLines | None = None) -> Iterator[str]:
    """URL of a server of both, one past the other, with what stands around them in a replica."""
    lines = lines or Lines()
    app = RequestLog(Security(RequestLimits(PastRay(ray), 1_000_000, 5)), lines)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))

        def run() -> None:
            async def serve() -> None:
                if ours is not None:
                    ready[asyncio.get_running_loop()] = RequestLog(Security(ours), lines)
                await server.serve([listener])

            with mock.patch.dict(ready):
                asyncio.run(serve())

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.parametrize("path", ["/v1/classify", "/predict", "/"])
def test_what_goes_through_the_queue_passes_by(path: str) -> None:
    with served(Application(b"Ray"), Application(b"we")) as url, httpx.Client() as client:
        for number in range(3):  # on one connection
            body = b"%d " % number * 90_000
            answer = client.post(url + path, content=body)
            assert answer.content == b"we " + body
            assert {"x-request-id", "x-content-type-options"} <= set(answer.headers)


def test_all_else_does_not() -> None:
    with served(Application(b"Ray"), Application(b"we")) as url, httpx.Client() as client:
        for answer in (client.get(url), client.post(f"{url}/v1/explain"), client.get(f"{url}/-/healthz")):
            assert answer.content == b"Ray "


def test_nothing_does_where_the_application_runs_in_another_loop() -> None:
    other = asyncio.new_event_loop()
    with mock.patch.dict(ready, {other: Application(b"we")}), served(Application(b"Ray"), None) as url:
        assert httpx.post(f"{url}/v1/classify", content=b"late").content == b"Ray late"
    other.close()


def test_an_application_is_ready_as_long_as_it_lives() -> None:
    async def run() -> None:
        told: asyncio.Queue[Message] = asyncio.Queue()
        heard: asyncio.Queue[Message] = asyncio.Queue()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            for each in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{each}.complete"})

        life = asyncio.create_task(Announced(app)({"type": "lifespan"}, told.get, heard.put))
        await told.put({"type": "lifespan.startup"})
        await heard.get()
        assert ready[asyncio.get_running_loop()] is app
        await told.put({"type": "lifespan.shutdown"})
        await life

    asyncio.run(run())
    assert not ready


def test_who_has_gone_is_not_answered() -> None:
    app, lines = Application(b"we", waits=True), Lines()
    with served(Application(b"Ray"), app, lines) as url:
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)) as client:
            client.sendall(post(b"late"))
            assert app.began.wait(10)
            assert not app.cancelled.is_set()
        assert app.cancelled.wait(10)
    assert lines.statuses == [499]


def test_a_failure_is_one_clear_answer() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise ValueError("secret")

    lines = Lines()
    with served(Application(b"Ray"), failing, lines) as url, httpx.Client() as client:
        for _ in range(2):
            answer = client.post(f"{url}/predict", content=b"late")
            assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
            assert {"x-request-id", "x-content-type-options", "cache-control"} <= set(answer.headers)
            assert "secret" not in answer.text
    assert lines.statuses == [500, 500]


def test_a_server_that_stops_lets_what_is_under_way_end() -> None:
    """As Ray stops a replica: by its HTTP server."""
    release = threading.Event()

    class Slow(Application):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            self.began.set()
            await asyncio.to_thread(release.wait, 10)
            await super().__call__(scope, receive, send)

    app, answers = Slow(b"we"), list[httpx.Response]()
    with served(Application(b"Ray"), app) as url:

        def ask() -> None:
            answers.append(httpx.post(f"{url}/v1/classify", content=b"late", timeout=20))

        asking = threading.Thread(target=ask)
        asking.start()
        assert app.began.wait(10)
        threading.Timer(0.5, release.set).start()
    asking.join()
    assert answers[0].content == b"we late"
