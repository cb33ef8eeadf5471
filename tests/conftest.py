"""Fixtures that all tests share: one Ray cluster, and an S3 server of our own."""

import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import hypothesis
import pytest
import ray
from moto.server import ThreadedMotoServer
from upath import UPath

from cluster.connect import connected

# A slow machine is no failure.
hypothesis.settings.register_profile("shoal", deadline=None)
hypothesis.settings.load_profile("shoal")
# Runs of seconds: their end, and a lost worker, are noticed at the next health check.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray cluster for the whole test session."""
    with connected("local", cpus=4, object_store_bytes=400_000_000):
        yield
    assert not ray.is_initialized()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket on an S3 server of our own; the environment leads there."""
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
    yield "s3://shoal"
    UPath("s3://shoal").fs.clear_instance_cache()
    server.stop()


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
