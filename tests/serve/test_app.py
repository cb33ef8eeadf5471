"""The endpoint on Ray Serve behind HAProxy: what only the whole of it shows."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from upath import UPath

from cluster.store import ClusterError
from models.settings import InputError
from models.torch_engine import load_torch_engine
from serve import app, ingress
from serve.exchange import Exchange
from serve.haproxy import write_starter
from serve.keys import create_key
from serve.model import ServedModel
from serve.ownership import claiming, standing
from serve.settings import ServeSettings
from tests.serve.endpoint import post, problem_of, raw
from tests.small_classifiers import CORPUS, make_classifier


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def settings() -> ServeSettings:
    return ServeSettings(
        port=free_port(), min_replicas=2, max_replicas=2, cpus=0.5, precision="fp32", body_timeout_s=1, drain_s=1
    )


@pytest.fixture(scope="module")
def url(ray_session: None, folder: Path, settings: ServeSettings) -> Iterator[str]:
    model = ServedModel(
        "small", "f00d", UPath(folder), temperature={"sentiment": 2.0}, card={"metrics": {"accuracy": 0.9}}
    )
    url = app.serve_model(settings, model)
    yield url
    app.stop()


def test_answers_are_calibrated_and_those_of_the_engine(url: str, folder: Path) -> None:
    engine = load_torch_engine(folder, precision="fp32", temperature={"sentiment": 2.0})
    results = httpx.post(f"{url}/v1/classify", json={"texts": CORPUS}).json()["results"]
    for found, expected in zip(results, engine.classify(CORPUS), strict=True):
        probabilities = expected.labels["sentiment"].probabilities
        assert found["labels"]["sentiment"]["probabilities"] == pytest.approx(probabilities, abs=1e-5)
    assert httpx.get(f"{url}/v1/model").json()["metrics"] == {"accuracy": 0.9}
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}


def test_everything_listens_on_loopback_only(url: str) -> None:
    port = int(url.rsplit(":", 1)[1])
    until = time.monotonic() + 30
    # HAProxy is another process after each reload, and the one found may have ended before it is asked.
    while not {port, 8404, 9101} <= {address.port for address in serve_listens()}:
        assert time.monotonic() < until, serve_listens()
        time.sleep(0.5)
    listening = serve_listens()
    # Above 32768 are the ports by which Ray's processes talk to each other.
    assert {address.ip for address in listening if address.port < 32768 or address.port == port} == {"127.0.0.1"}


def serve_listens() -> list[Any]:
    """Addresses on which HAProxy and Serve's processes listen now."""
    (raylet,) = (p for p in psutil.Process().children() if "raylet" in p.name())
    listening = []
    for process in raylet.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "haproxy" or "Serve" in process.name():
                listening += [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return listening


def test_mistakes_are_problems_behind_the_proxy_too(url: str) -> None:
    good = b'{"texts": ["late"]}'
    assert raw(url, b"NOT HTTP\r\n\r\n")[0] == 400
    assert problem_of(raw(url, post(b"{")))[0] == 400
    assert problem_of(raw(url, b"GET /nothing HTTP/1.1\r\nHost: shoal\r\n\r\n"))[0] == 404
    assert problem_of(raw(url, b"PUT /v1/classify HTTP/1.1\r\nHost: shoal\r\nContent-Length: 0\r\n\r\n"))[0] == 405
    assert problem_of(raw(url, post(b'{"texts": [3]}')))[0] == 422
    assert raw(url, post(good, f"X-Long: {'x' * 40_000}"))[0] == 400
    for header in ("X-Request-Id: \xff\xfe", "X-Request-Timeout-Seconds: 0.000001", "serve_multiplexed_model_id: \xff"):
        assert raw(url, post(good, header))[0] == 200


def test_a_request_to_change_the_protocol_is_a_plain_one(url: str) -> None:
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    upgrade = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", key]
    status, _, body = raw(url, post(b'{"texts": ["late"]}', *upgrade))
    assert status == 200
    assert len(json.loads(body)["results"]) == 1
    greeting = "\r\n".join(["GET /v1/classify HTTP/1.1", "Host: shoal", *upgrade, "", ""]).encode()
    assert problem_of(raw(url, greeting))[0] == 405


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"FOO /v1/classify HTTP/1.1\r\nHost: shoal\r\n\r\n", 400),
        (post(b"", length=2**64), 400),
        (post(b"", "X: \x01"), 400),
        (b"GET v1/classify HTTP/1.1\r\nHost: shoal\r\n\r\n", 404),
        (b"GET http://shoal/nowhere HTTP/1.1\r\nHost: shoal\r\n\r\n", 404),
        (b"GET /v1/classify/ HTTP/1.1\r\nHost: shoal\r\n\r\n", 404),
        (b"OPTIONS * HTTP/1.1\r\nHost: shoal\r\n\r\n", 404),
    ],
)
def test_what_never_reaches_the_application_is_a_problem_too(url: str, request_bytes: bytes, status: int) -> None:
    assert problem_of(raw(url, request_bytes))[0] == status


def test_a_huge_body_is_refused(url: str) -> None:
    assert problem_of(raw(url, post(b"", length=100_000_000)))[0] == 413
    with contextlib.suppress(httpx.TransportError):  # told while still sending
        assert httpx.post(f"{url}/v1/classify", content=b"x" * 100_000_000, timeout=20).status_code == 413
    assert httpx.post(f"{url}/v1/classify", json={"texts": ["late"]}).status_code == 200


def test_slow_clients_are_told(url: str) -> None:
    assert problem_of(raw(url, post(b'{"texts"', length=100)))[0] == 408
    assert raw(url, b"POST /v1/classify HTTP/1.1\r\nHost: sh")[0] == 408


def test_metrics_are_those_of_all_replicas(url: str) -> None:
    for _ in range(20):
        httpx.post(f"{url}/v1/classify", json={"texts": ["late", "late"]})
    raw(url, post(b"", length=100_000_000))
    deadline = time.monotonic() + 15
    while True:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        texts = [line for line in lines if line.startswith("shoal_texts_total{")]
        too_large = [line for line in lines if line.startswith("shoal_requests_total{") and 'status="413"' in line]
        if len(texts) == 2 and sum(float(line.rsplit(" ", 1)[1]) for line in texts) >= 40 and too_large:
            break
        assert time.monotonic() < deadline, texts
        time.sleep(0.5)
    assert lines.count("# TYPE shoal_texts_total counter") == 1


def test_a_killed_replica_costs_a_client_one_retry_at_most(url: str) -> None:
    """One of two replicas is killed while clients ask: what it had in hand is answered by the other.

    Nearly always at once, through HAProxy; in the moment before it knows of the death a client may lose its
    connection or be told 503, and its second try must succeed.
    """
    statuses: list[int] = []
    refused: list[int] = []
    done = threading.Event()

    def post(client: httpx.Client) -> int:
        try:
            return client.post("/v1/classify", json={"texts": ["late"]}).status_code
        except httpx.TransportError as error:
            print(f"lost: {error!r}")
            return 503

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=20) as client:
            while not done.is_set():
                status = post(client)
                if status == 503:
                    refused.append(status)
                    time.sleep(2)
                    status = post(client)
                statuses.append(status)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    (raylet,) = (p for p in psutil.Process().children() if "raylet" in p.name())
    replica = next(p for p in raylet.children(recursive=True) if p.name().startswith("ray::ServeReplica"))
    os.kill(replica.pid, signal.SIGKILL)
    time.sleep(4)
    done.set()
    for thread in threads:
        thread.join()
    assert statuses == [200] * len(statuses)
    assert statuses
    assert len(refused) <= len(threads)


_NESTED = "import subprocess, sys; subprocess.Popen({command}); input()"


def test_the_proxy_ends_with_its_cluster_and_not_with_who_started_it(tmp_path: Path) -> None:
    port = free_port()
    configuration = tmp_path / "haproxy.cfg"
    lines = [
        "defaults",
        "    mode http",
        "    timeout client 5s",
        "frontend http_frontend",
        f"    bind 127.0.0.1:{port}",
    ]
    configuration.write_text("\n".join([*lines, "    http-request return status 200", ""]))
    starter = write_starter(tmp_path, 1, max_wait_s=2)
    actor = _NESTED.format(command=[str(starter), "-db", "-f", str(configuration)])
    raylet = _NESTED.format(command=[sys.executable, "-c", actor])

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}").status_code == 200
        return False

    with subprocess.Popen([sys.executable, "-c", raylet], stdin=subprocess.PIPE) as process:
        try:
            wait_until(answers)
            (child,) = psutil.Process(process.pid).children()
            child.kill()
            time.sleep(3)
            assert answers()
        finally:
            process.kill()
    wait_until(lambda: not answers())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_endpoint_that_another_process_serves_by_now_is_left_to_it(url: str) -> None:
    owner = Exchange("shoal-endpoint", "owner")
    ours = owner.get()
    assert ours
    assert standing() == "ours"
    try:
        for page, found in (
            ({"owner": "another"}, "another's"),
            ({"claimed_by": "another", "claimed_at": time.time()}, "claimed"),
            ({"owner": "another", "claimed_by": "a third", "claimed_at": time.time() - 10_000}, "another's"),
        ):
            owner.put(json.dumps(json.loads(ours) | page))
            assert standing() == found
            app.stop()
            assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    finally:
        owner.put(ours)


def test_a_claim_that_fails_gives_the_endpoint_back(url: str) -> None:
    owner = Exchange("shoal-endpoint", "owner")
    ours = owner.get()
    assert ours
    owner.put(theirs := json.dumps({"owner": "another"}))
    try:
        with pytest.raises(KeyboardInterrupt), claiming():
            raise KeyboardInterrupt
        assert json.loads(owner.get() or "")["owner"] == json.loads(theirs)["owner"]
        assert standing() == "another's"
        with claiming():
            pass
        assert standing() == "ours"
    finally:
        owner.put(ours)


def test_a_taken_port_is_told(ray_session: None, url: str, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        other = ServeSettings(port=taken.getsockname()[1])
        with pytest.raises(ClusterError, match=r"serves at port \d+ already"):
            app.serve_model(other, ServedModel("small", "f00d", UPath(folder)))
        with pytest.raises(ClusterError, match=r"cannot listen on .*; choose another with serve.port=PORT"):
            ingress._require_free_port(other)


def test_a_second_model_takes_the_place_of_the_first_and_may_demand_keys(
    url: str, settings: ServeSettings, folder: Path, tmp_path: Path
) -> None:
    _, key = create_key(UPath(tmp_path), "a")
    guarded = settings.model_copy(update={"keys": True})
    assert app.serve_model(guarded, ServedModel("small", "beef", UPath(folder)), store=UPath(tmp_path)) == url
    assert httpx.get(f"{url}/v1/model", headers={"X-API-Key": key}).json()["version"] == "beef"
    shown = post(b'{"texts": ["late"]}', f"Authorization: Bearer {key}")
    status, headers, body = raw(url, shown)
    assert (status, json.loads(body)["version"]) == (200, "beef")
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    assert problem_of(raw(url, post(b'{"texts": ["late"]}')))[0] == 401
    assert problem_of(raw(url, post(b"", length=100_000_000)))[0] == 401
    assert httpx.get(f"{url}/healthz").status_code == 200
    # Ray's own proxy, past HAProxy and the replica's HTTP server.
    assert httpx.get("http://127.0.0.1:8500/v1/model").status_code == 401
    assert httpx.get("http://127.0.0.1:8500/v1/model", headers={"X-API-Key": key}).status_code == 200


def test_a_model_that_cannot_be_served_is_told(url: str, settings: ServeSettings, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no classifier"):
        app.serve_model(settings, ServedModel("small", "dead", UPath(tmp_path)))
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ClusterError, match=r"the endpoint does not start: \S+model\.safetensors is damaged"):
        app.serve_model(settings, ServedModel("small", "dead", UPath(broken)))
