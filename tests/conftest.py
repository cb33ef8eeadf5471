"""Fixtures that all tests share: one Ray cluster, an S3 server of our own, and the command."""

import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import hypothesis
import pytest
import ray
from moto.server import ThreadedMotoServer
from upath import UPath

import shoal
from cluster.connect import connected
from cluster.logs import CommandLog
from recipes import running

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

# A slow machine is no failure.
hypothesis.settings.register_profile("shoal", deadline=None)
hypothesis.settings.load_profile("shoal")
# Runs of seconds: their end, and a lost worker, are noticed at the next health check.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"


def pytest_runtest_setup() -> None:
    """Where SHOAL_TESTS_UNTIL (in seconds since 1970) is over, skips: rather some tests less than no verdict."""
    if time.time() > float(os.environ.get("SHOAL_TESTS_UNTIL", "inf")):
        pytest.skip("the time that there was for tests is over")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray cluster for the whole test session."""
    with connected("local", cpus=4, object_store_bytes=400_000_000):
        yield
    assert not ray.is_initialized()


class RefusingWrites:
    """An S3 server's application that can be told to take nothing more."""

    def __init__(self, app: "WSGIApplication") -> None:
        self._app = app
        self.refuses = False
        self.refused = 0

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if not self.refuses or environ["REQUEST_METHOD"] in {"GET", "HEAD"}:
            return self._app(environ, start_response)
        self.refused += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("503 Slow Down", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RefusingWrites]:
    """An S3 server of our own, with a bucket; the environment leads there."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    boto3.client("s3").create_bucket(Bucket="shoal")
    UPath("s3://shoal").fs.clear_instance_cache()
    assert server._server is not None
    refusing = server._server.app = RefusingWrites(server._server.app)
    yield refusing
    UPath("s3://shoal").fs.clear_instance_cache()
    server.stop()


@pytest.fixture
def hub_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hugging Face hub is not to be reached, and nobody tries for long."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def bucket(s3_server: RefusingWrites) -> str:
    """An empty bucket on it."""
    return "s3://shoal"


def mounted(folder: Path, *options: str) -> bool:
    """Whether a small filesystem could be mounted there."""
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", ",".join(["size=64k", *options]), "tmpfs", str(folder)]
    return bool(mount) and os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 64 kB."""
    folder = tmp_path / "disk"
    if not mounted(folder):
        pytest.skip("needs to mount a filesystem")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs the command in this process, without colours, logging to a folder of its own."""
    monkeypatch.setenv("SHOAL_LOGS", str(tmp_path / "logs"))
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(running, "LOG", CommandLog())
        capfd.readouterr()
        status = shoal.main([str(each) for each in arguments])
        return Outcome(status, *capfd.readouterr())

    return run
