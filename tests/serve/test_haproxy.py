"""What HAProxy answers by itself while no replica runs, with the configuration that Ray writes, mended."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from serve.haproxy import expect_end, write_starter
from tests.serve.endpoint import post, problem_of, raw
from tests.serve.test_app import free_port, wait_until

CONFIGURATION = """
global
    stats socket {folder}/admin.sock
defaults
    mode http
    timeout client 5s
    timeout connect 1s
    timeout server 5s
    retries 0
frontend http_frontend
    bind 127.0.0.1:{port}
    {route}
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path not found."
{backend}
"""
BACKEND = """
backend http-shoal
    server {name} 127.0.0.1:{port}
"""


@contextlib.contextmanager
def haproxy(folder: Path, replica: str | None, *, rests: bool) -> Iterator[str]:
    """The URL of an HAProxy with a backend whose only server has this name, and does not answer."""
    port = free_port()
    backend = BACKEND.format(name=replica, port=free_port()) if replica else ""
    route = "use_backend http-shoal" if replica else ""
    configuration = folder / "haproxy.cfg"
    configuration.write_text(CONFIGURATION.format(folder=folder, port=port, route=route, backend=backend))
    starter = write_starter(folder, 1, rests_with_bodies_of=1000 if rests else None, max_wait_s=2)
    url = f"http://127.0.0.1:{port}"

    def listens() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/-/nothing").status_code > 0
        return False

    with subprocess.Popen([starter, "-db", "-f", configuration], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(listens)
            yield url
        finally:
            expect_end(folder)
            process.kill()


def test_at_rest_probes_and_bodies_too_large_go_no_further(tmp_path: Path) -> None:
    with haproxy(tmp_path, "SERVE_PROXY_ACTOR-fallback", rests=True) as url:
        health = httpx.get(f"{url}/healthz")
        assert health.json() == {"status": "resting"}
        assert health.headers["x-content-type-options"] == "nosniff"
        assert httpx.get(f"{url}/health").content == b""
        page = httpx.get(f"{url}/metrics").text
        assert page.startswith("#")
        assert page.endswith("\n")
        status, sentence = problem_of(raw(url, post(b"", length=1001)))
        assert (status, "larger than 1,000 bytes" in sentence) == (413, True)
        assert problem_of(raw(url, post(b"x" * 1000)))[0] == 503, "this one goes on to Ray's proxy"


@pytest.mark.parametrize(
    ("server", "rests"), [("SERVE_REPLICA--shoal-Classifier-1", True), ("SERVE_PROXY_ACTOR-fallback", False)]
)
def test_with_replicas_or_where_it_never_rests_they_are_asked(tmp_path: Path, server: str, rests: bool) -> None:
    with haproxy(tmp_path, server, rests=rests) as url:
        assert httpx.get(f"{url}/healthz").status_code == 503
        assert problem_of(raw(url, post(b"", length=1001)))[0] == 503


def test_before_it_is_told_of_replicas_it_says_so_and_not_that_there_is_nothing(tmp_path: Path) -> None:
    with haproxy(tmp_path, None, rests=True) as url:
        answer = httpx.post(f"{url}/v1/classify", json={"texts": ["late"]})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_if_it_is_killed_another_stands_in_until_the_next_takes_over(tmp_path: Path) -> None:
    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/v1/model").status_code == 503
        return False

    with haproxy(tmp_path, "SERVE_REPLICA--shoal-Classifier-1", rests=False) as url:
        (first,) = listeners(tmp_path)
        time.sleep(1)  # one that never came to work is not stood in for
        first.kill()
        wait_until(answers)
        (other,) = listeners(tmp_path)
        assert other.pid != first.pid
        assert "stats socket" not in (tmp_path / "stand-in.cfg").read_text()
        with subprocess.Popen([tmp_path / "start-haproxy", "-db", "-f", tmp_path / "haproxy.cfg", "-dR"]) as process:
            try:
                wait_until(lambda: [each.pid for each in listeners(tmp_path)] == [process.pid])
                assert answers()
                expect_end(tmp_path)
            finally:
                process.kill()
        time.sleep(1)
        assert not listeners(tmp_path), "its end was expected"


def listeners(folder: Path) -> list[psutil.Process]:
    """The HAProxys that run with a configuration of the folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "haproxy" and process.cwd() == str(folder):
                found.append(process)
    return found
