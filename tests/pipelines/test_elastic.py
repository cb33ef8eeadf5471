"""Exact elasticity: whatever happens to the cluster, a run ends in the bits of one that nothing happened to."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def disturbed(folder: Path, seed: int, events: list[str]) -> dict[str, Any]:
    """What came of a run with these events (tests/pipelines/elastic_run.py)."""
    command = [sys.executable, "-m", "tests.pipelines.elastic_run", str(folder), str(seed), *events]
    # Short, for sockets lie there.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            out, _ = process.communicate(timeout=1500)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def assert_exact(found: dict[str, Any], interruptions: int) -> None:
    assert found["audits"] == ["exact", "exact"]
    assert found["same_history"]
    assert found["same_weights"]
    assert len(found["groups"]) - 1 >= interruptions
    assert all(group.get("cause", "") for group in found["groups"][:-1])


@pytest.mark.parametrize(
    "events",
    [["drain", "raylet"], pytest.param(["worker", "drain", "raylet", "add"], marks=pytest.mark.slow)],
    ids=["go", "come and go"],
)
def test_a_run_whose_nodes_come_and_go_is_the_run_of_one_worker(events: list[str], tmp_path: Path) -> None:
    found = disturbed(tmp_path, 1, events)
    assert_exact(found, interruptions=min(3, len(events)))
    assert len({group["workers"] for group in found["groups"]}) > 1
    drained = [group for group in found["groups"] if "taken away" in group.get("cause", "")]
    assert drained
    assert any(group.get("cause", "").startswith("a node was lost: ") for group in found["groups"])


@pytest.mark.long
@pytest.mark.parametrize("seed", [2, 3])
def test_ten_events_of_all_kinds_change_nothing(seed: int, tmp_path: Path) -> None:
    events = ["worker", "raylet", "add", "drain", "add", "below", "add", "worker", "add", "worker"]
    # What may come in any order does; nodes must be there before they can go.
    tail = events[6:]
    random.Random(seed).shuffle(tail)
    found = disturbed(tmp_path, seed, events[:6] + tail)
    assert_exact(found, interruptions=6)
