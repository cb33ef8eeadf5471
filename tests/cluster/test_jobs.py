"""Inside a submitted Ray job the same command works, on a head with a dashboard as `ray up` makes it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.connect import ENVIRONMENT
from cluster.store import Store
from tests.test_cli import make_recipe

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Ray head of our own, with a home folder of its own; yields the environment that leads a client there."""
    home = tmp_path / "home"
    home.mkdir()
    session = tempfile.mkdtemp(prefix="ray-")  # Short: sockets in it may have 107 bytes at most.
    port, dashboard = free_port(), free_port()
    tools = str(Path(sys.executable).parent)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | ENVIRONMENT | {"HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"}
    options = [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={session}", "--num-cpus=2"]
    options += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    process = subprocess.Popen(
        ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--include-dashboard=true", *options],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for(f"{address}/api/jobs/")
        yield environment | {"RAY_ADDRESS": address}
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(session, ignore_errors=True)


def _wait_for(url: str) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(1)
        else:
            return


@pytest.mark.slow
def test_a_job_runs_a_recipe_into_a_store_that_outlives_it(head: dict[str, str], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    job = ["ray", "job", "submit", "--working-dir", str(ROOT), "--", "python", "-m", "shoal", "run", str(recipe)]
    done = subprocess.run([*job, "store=mine"], env=head, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    store = Store.open(str(Path(head["HOME"]) / "mine"))
    assert {artifact.record.stage for artifact in store.artifacts()} == {"prepare", "finetune", "evaluate", "export"}
    again = subprocess.run([*job, "store=mine"], env=head, capture_output=True, text=True)
    assert again.stdout.count("reused") == 4
    wrong = subprocess.run([*job, "finetune.epoch=3"], env=head, capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "finetune.epoch is no setting; did you mean finetune.epochs?" in wrong.stdout
