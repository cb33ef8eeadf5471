"""HAProxy refuses for as long as every replica has just said that it is full, and tells afterwards how often."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from serve.haproxy import expect_end, write_starter
from serve.shedding import FULL, SHED, is_lasting, moment_s
from tests.serve.test_app import free_port, wait_until
from tests.serve.test_haproxy import CONFIGURATION

BACKEND = "backend http-shoal\n    balance roundrobin\n"
MOMENT_S = moment_s(2)


class Replica(ThreadingHTTPServer):
    """Answers as a replica would, full or not."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.full = False
        self.asked = 0
        self.told: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    """One request to a replica."""

    protocol_version = "HTTP/1.1"
    server: Replica

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        self.server.told.append(self.headers[SHED])
        self.send_response(429 if self.server.full else 200)
        if self.server.full:
            self.send_header(FULL, "1")
            self.send_header("Retry-After", "7")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def replicas(count: int) -> Iterator[list[Replica]]:
    started = [Replica() for _ in range(count)]
    for each in started:
        threading.Thread(target=each.serve_forever, daemon=True).start()
    try:
        yield started
    finally:
        for each in started:
            each.shutdown()
            each.server_close()


@contextlib.contextmanager
def front(folder: Path, behind: list[Replica]) -> Iterator[httpx.Client]:
    port = free_port()
    servers = "".join(f"    server r{number} 127.0.0.1:{each.server_port}\n" for number, each in enumerate(behind))
    configuration = folder / "haproxy.cfg"
    route = "use_backend http-shoal"
    configuration.write_text(CONFIGURATION.format(folder=folder, port=port, route=route, backend=BACKEND + servers))
    starter = write_starter(folder, 1, max_wait_s=2)
    with (
        subprocess.Popen([starter, "-db", "-f", configuration]) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):

        def listens() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return client.get("/nothing").status_code > 0
            return False

        try:
            wait_until(listens)
            yield client
        finally:
            expect_end(folder)
            process.kill()


def post(client: httpx.Client, path: str = "/v1/classify", **headers: str) -> httpx.Response:
    return client.post(path, json={}, headers={name.replace("_", "-"): value for name, value in headers.items()})


def test_what_a_full_replica_refuses_is_refused_before_it(tmp_path: Path) -> None:
    with replicas(1) as (replica,), front(tmp_path, [replica]) as client:
        assert post(client, **{SHED: "99"}).status_code == 200
        assert replica.told == [None], "only HAProxy may say what was refused"
        replica.full = True
        first = post(client)
        assert (first.status_code, FULL in first.headers) == (429, False)
        shed = [post(client) for _ in range(5)]
        assert [answer.status_code for answer in shed] == [429] * 5
        assert replica.asked == 2
        assert shed[0].headers["retry-after"] == "7"
        assert shed[0].headers["x-content-type-options"] == "nosniff"
        problem = shed[0].json()
        assert problem["detail"] == "Too many requests wait; try again in 7 s."
        assert problem["request_id"] == shed[0].headers["x-request-id"] != shed[1].headers["x-request-id"]
        assert shed[0].headers["content-type"] == "application/problem+json"
        assert post(client, X_Request_Id="mine-1").json()["request_id"] == "mine-1"
        assert post(client, X_Request_Id='"').json()["request_id"] != '"'
        assert client.post("/v1/classify", content=b" " * 70_000).status_code == 429
        assert replica.asked == 3, "a large body is read before it is refused"
        assert post(client, "/predict").json()["error_type"] == "overloaded"
        assert post(client, "/v1/explain").status_code == 429, "this is the replica's own answer: it has another queue"
        assert replica.asked == 4
        replica.full = False
        time.sleep(1.5 * MOMENT_S)
        assert [post(client).status_code for _ in range(3)] == [200] * 3
        assert replica.told == [None, None, "7", None, "1", None, None]


def test_where_one_replica_has_room_all_are_asked(tmp_path: Path) -> None:
    with replicas(2) as (full, free), front(tmp_path, [full, free]) as client:
        full.full = True
        statuses = [post(client).status_code for _ in range(10)]
        assert sorted(statuses) == [200] * 5 + [429] * 5
        assert (full.asked, free.asked) == (5, 5)
        free.full = True
        assert {post(client).status_code for _ in range(10)} == {429}
        assert full.asked + free.asked <= 13


@pytest.mark.parametrize(("max_wait_s", "wait_s", "lasting"), [(2, 1.9, True), (2, 0.5, False), (0.1, 0.09, True)])
def test_a_queue_outlasts_the_moment(max_wait_s: float, wait_s: float, lasting: bool) -> None:
    assert is_lasting(wait_s, max_wait_s) == lasting
    assert moment_s(max_wait_s) <= max_wait_s / 4
