"""Replicas and the gateway come, go and die while clients ask: nobody is left without an answer."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray import serve as ray_serve
from upath import UPath

from cluster.store import ClusterError
from models.spec import SPEC
from serve import app
from serve.keys import create_key
from serve.model import ServedModel
from serve.settings import ServeSettings
from tests.serve.asking import asking
from tests.serve.endpoint import post, problem_of, raw
from tests.serve.test_app import free_port
from tests.small_classifiers import make_classifier

pytestmark = pytest.mark.slow

Serve = Callable[..., str]

BASE = ServeSettings(
    port=free_port(),
    max_replicas=2,
    cpus=0.5,
    precision="fp32",
    max_wait_s=60,
    target_busy=0.3,
    upscale_delay_s=0.5,
    downscale_delay_s=2,
    rest_after_s=2,
    drain_s=2,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return ServedModel("small", "f00d", UPath(make_classifier(tmp_path_factory.mktemp("served"))))


@pytest.fixture(scope="module")
def serve(ray_session: None, model: ServedModel) -> Iterator[Serve]:
    """Serves with settings of its own, but for what is served already."""
    now: list[Any] = []

    def serve(model: ServedModel = model, store: Path | None = None, **settings: Any) -> str:
        if now != [model, settings]:
            now[:] = []
            app.serve_model(BASE.model_copy(update=settings), model, UPath(store) if store else None)
            now[:] = [model, settings]
        return f"http://127.0.0.1:{BASE.port}"

    yield serve
    app.stop()


def replicas(state: str = "RUNNING") -> int:
    deployment = ray_serve.status().applications[app.APPLICATION].deployments["Classifier"]
    return sum(count for name, count in deployment.replica_states.items() if name == state)


def processes(name: str) -> set[int]:
    """Of this test's cluster."""
    (raylet,) = (p for p in psutil.Process().children() if "raylet" in p.name())
    found = set()
    for process in raylet.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(name):
                found.add(process.pid)
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> float:
    """The seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds
        time.sleep(0.05)
    return time.monotonic() - started


@contextlib.contextmanager
def heavy_load(url: str) -> Iterator[None]:
    """More than one replica can compute in its share of the time."""
    done = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not done.is_set():
                client.post("/v1/classify", json={"texts": ["late " * 30] * 64})

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.fixture
def one(serve: Serve) -> str:
    """The URL of an endpoint with one replica, which grows to two under load."""
    url = serve()
    wait_until(lambda: replicas() == 1 and len(processes("ray::ServeReplica")) == 1)
    return url


def test_scaling_down_loses_no_request(one: str) -> None:
    with asking(one) as asked:
        with heavy_load(one):
            wait_until(lambda: replicas() == 2)
        wait_until(lambda: replicas() == 1)
        wait_until(lambda: not replicas("STOPPING"))
    assert set(asked.statuses) == {200}
    assert asked.retried <= 2, "those that were sent on a connection that was just being closed"


def test_a_replica_that_starts_goes_before_one_that_answers(one: str, model: ServedModel) -> None:
    """What the second replica loads is a pipe that nobody writes to, so it goes on starting."""
    before = processes("ray::ServeReplica")
    spec = Path(str(model.torch)) / SPEC
    content = spec.read_bytes()
    spec.unlink()
    os.mkfifo(spec)
    try:
        with asking(one) as asked:
            with heavy_load(one):
                wait_until(lambda: replicas("STARTING") == 1)
            wait_until(lambda: not replicas("STARTING"))
            wait_until(lambda: not replicas("STOPPING"))
        assert replicas() == 1
        assert processes("ray::ServeReplica") >= before, "the one that answered goes on answering"
        assert set(asked.statuses) == {200}
    finally:
        spec.unlink()
        spec.write_bytes(content)


def test_other_settings_take_the_place_of_the_former_and_no_request_is_lost(one: str, serve: Serve) -> None:
    with asking(one) as asked:
        serve(max_texts=7)
        wait_until(lambda: not replicas("STOPPING"))
    assert set(asked.statuses) == {200}
    assert asked.retried <= 2
    print(asked)
    assert asked.slowest_s < 3, "none had to wait for the start of a replica"
    assert httpx.post(f"{one}/v1/classify", json={"texts": ["late"] * 8}).status_code == 422


def test_what_does_not_start_leaves_the_former_answering(serve: Serve, model: ServedModel, tmp_path: Path) -> None:
    url = serve(max_texts=7)
    broken = shutil.copytree(Path(str(model.torch)), tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"broken")
    with asking(url) as asked, pytest.raises(ClusterError, match="is damaged"):
        serve(ServedModel("small", "dead", UPath(broken)))
    assert set(asked.statuses) == {200}
    assert httpx.get(f"{url}/v1/model").json()["version"] == "f00d"


def test_at_rest_a_request_wakes_a_replica_and_is_answered(serve: Serve, tmp_path: Path) -> None:
    _, key = create_key(UPath(tmp_path), "a")
    url = serve(store=tmp_path, min_replicas=0, keys=True)
    wait_until(lambda: not replicas() and not replicas("STOPPING"))
    time.sleep(1)  # Until HAProxy has heard of it.
    assert httpx.get(f"{url}/healthz").json() == {"status": "resting"}
    assert httpx.get(f"{url}/health").status_code == 200
    assert "rests" in httpx.get(f"{url}/metrics").text
    assert problem_of(raw(url, post(b"", length=100_000_000)))[0] == 413
    assert not replicas()
    assert not replicas("STARTING"), "none of these is to wake it"
    answers: list[httpx.Response] = []

    def ask(**headers: str) -> None:
        answers.append(httpx.post(f"{url}/v1/classify", json={"texts": ["late"]}, headers=headers, timeout=60))

    threads = [threading.Thread(target=ask, kwargs={"X-API-Key": key} if known else {}) for known in (True, False) * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200] * 8 + [401] * 8
    assert {answer.headers["x-content-type-options"] for answer in answers} == {"nosniff"}
    wait_until(lambda: httpx.get(f"{url}/healthz").json() == {"status": "ok"})
    wait_until(lambda: not replicas())


@pytest.fixture
def two(serve: Serve) -> str:
    """The URL of an endpoint with two replicas."""
    url = serve(min_replicas=2)
    wait_until(lambda: replicas() == 2 and len(processes("ray::ServeReplica")) == 2)
    return url


def test_a_killed_replica_loses_no_request(two: str) -> None:
    with asking(two) as asked:
        time.sleep(1)
        before = processes("ray::ServeReplica")
        os.kill(min(before), signal.SIGKILL)
        wait_until(lambda: bool(processes("ray::ServeReplica") - before))
        wait_until(lambda: replicas() == 2)
        time.sleep(1)
    assert set(asked.statuses) == {200}
    assert asked.retried <= 3, "those that were on their way to the dead one more often than HAProxy tries"


def test_a_killed_gateway_costs_a_client_one_retry_at_most(two: str) -> None:
    with asking(two, pause_s=0.3) as asked:
        time.sleep(1)
        before = processes("haproxy")
        for process in before:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.5)

        def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{two}/healthz").status_code == 200
            return False

        print(f"It answers after {0.5 + wait_until(answers):.1f} s.")
        stood_in = processes("haproxy")

        def settled() -> bool:
            now = processes("haproxy")
            return len(now) == 1 and not now & (before | stood_in)

        print(f"Ray's own stands alone {wait_until(settled):.1f} s later.")
        time.sleep(3)
    print(asked)
    assert set(asked.statuses) == {200}
    assert asked.retried <= 20
