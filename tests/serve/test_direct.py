"""Requests to the queue pass Ray's handling by, and lose nothing of it that their clients need."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.direct import PastRay, ready
from serve.request_log import RequestLines, RequestLog
from tests.serve.endpoint import post


class Application:
    """Answers with the body, at once or when it is let; remembers what became of it."""

    def __init__(self, name: bytes, *, waits: bool = False) -> None:
        self.name = name
        self.waits = waits
        self.began = threading.Event()
        self.cancelled = threading.Event()
        self.finished = threading.Event()

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
        self.finished.set()


@contextmanager
def served(ray: ASGIApp, ours: ASGIApp | None) -> Iterator[tuple[str, int]]:
    """Address of a server with both, one past the other."""
    lines = RequestLines("none")
    app = RequestLog(PastRay(ray), lines)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))

        def run() -> None:
            async def serve() -> None:
                loop = asyncio.get_running_loop()
                if ours is not None:
                    ready[loop] = ours
                try:
                    await server.serve([listener])
                finally:
                    ready.pop(loop, None)

            asyncio.run(serve())

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("path", ["/v1/classify", "/predict", "/"])
def test_what_goes_through_the_queue_passes_by(path: str) -> None:
    with served(Application(b"Ray"), Application(b"we")) as (host, port), httpx.Client() as client:
        for number in range(3):  # on one connection
            body = b"%d " % number * 9000
            assert client.post(f"http://{host}:{port}{path}", content=body).content == b"we " + body


def test_all_else_does_not() -> None:
    with served(Application(b"Ray"), Application(b"we")) as (host, port), httpx.Client() as client:
        url = f"http://{host}:{port}"
        for answer in (client.get(url), client.post(f"{url}/v1/explain"), client.get(f"{url}/-/healthz")):
            assert answer.content == b"Ray "


def test_nothing_does_where_the_application_runs_in_another_loop() -> None:
    with served(Application(b"Ray"), None) as (host, port):
        assert httpx.post(f"http://{host}:{port}/v1/classify", content=b"late").content == b"Ray late"


def test_who_has_gone_is_not_answered(caplog: pytest.LogCaptureFixture) -> None:
    app = Application(b"we", waits=True)
    with served(Application(b"Ray"), app) as (host, port):
        with socket.create_connection((host, port)) as client:
            client.sendall(post(b"late"))
            assert app.began.wait(10)
            assert not app.cancelled.is_set()
        assert app.cancelled.wait(10)
    assert not caplog.records


def test_a_server_that_stops_lets_what_is_under_way_end() -> None:
    """As Ray stops a replica: by its HTTP server."""
    release = threading.Event()

    class Slow(Application):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            self.began.set()
            await asyncio.to_thread(release.wait, 10)
            await super().__call__(scope, receive, send)

    app, answers = Slow(b"we"), list[httpx.Response]()
    with served(Application(b"Ray"), app) as (host, port):
        url = f"http://{host}:{port}/v1/classify"
        asking = threading.Thread(target=lambda: answers.append(httpx.post(url, content=b"late", timeout=20)))
        asking.start()
        assert app.began.wait(10)
        threading.Timer(0.5, release.set).start()
    asking.join()
    assert answers[0].content == b"we late"
