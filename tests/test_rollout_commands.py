"""`shoal rollout`: what it says and how it ends; and, slow, a whole rollout of a served model by the commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import httpx
import pytest

from cluster.connect import ENVIRONMENT
from cluster.registry import Registry
from cluster.rollouts import Rollouts, State, Step
from cluster.store import Store
from recipes import rollout_commands
from recipes.registering import register
from tests.conftest import Command
from tests.finished_stages import PRINTS, put_artifacts
from tests.serve.test_app import free_port
from tests.serve.test_rollout_app import Asking, until
from tests.small_classifiers import CORPUS

OTHER = PRINTS | {"finetune": "a" * 16, "evaluate": "b" * 16, "export": "c" * 16}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A store with two versions of a model."""
    store = Store.open(str(tmp_path / "store"))
    made = [put_artifacts(store, prints) for prints in (PRINTS, OTHER)]
    # Two versions of one mind.
    shutil.copytree(
        *(Path(each["finetune"].path.path) for each in made),
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("artifact.json"),
    )
    for artifacts in made:
        register(Registry(store), "small", artifacts)
    Registry(store).set_alias("small", "stable", 1)
    return tmp_path / "store"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_commands, "_TAKEN_UP_S", 0.1)


def test_an_order_waits_for_an_endpoint(place: Path, command: Command, hurried: None) -> None:
    outcome = command("rollout", "small", "2", "agreement=0.95", "--store", place, "--no-wait")
    assert (outcome.status, outcome.out) == (
        0,
        "small:2 is to be rolled out; `shoal rollout status small` tells how far it is.\n",
    )
    assert "no endpoint has taken it up yet" in command("rollout", "status", "small", "--store", place).out
    told = json.loads(command("rollout", "status", "small", "--json", "--store", place).out)
    assert (told["order"]["number"], told["order"]["plan"]["agreement"], told["state"]) == (2, 0.95, None)
    assert "no endpoint has taken it up yet" in command("rollout", "abort", "small", "--store", place).out


def test_how_it_goes_is_shown(place: Path, command: Command) -> None:
    rollouts = Rollouts(Registry(Store.open(str(place))), "small")
    order = rollouts.ask(2, {})

    def end() -> None:
        running = State(
            id=order.id, before=1, number=2, status="running", steps=(Step(name="shadow", status="running"),)
        )
        rollouts.tell(running)
        time.sleep(1.5)
        rollouts.tell(running.model_copy(update={"status": "rolled back", "reason": "at shadow: errors"}))

    thread = threading.Thread(target=end)
    thread.start()
    assert command("rollout", "start", "small", "2", "--store", place).status == 2, "one is under way"
    assert not rollout_commands._watched(rollouts, order.id)
    thread.join()
    shown = command("rollout", "status", "small", "--store", place).out
    assert "small:1 -> small:2: rolled back (at shadow: errors)" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["small", "9"], "small has no version 9 in "),
        (["small", "candidate"], "small has no alias candidate in "),
        (["large", "1"], "has no model large; it has small;"),
        (["small", "2", "agreement=2"], "agreement must be less than or equal to 1, not 2"),
        (["small", "2", "agree=0.9"], "agree"),
        (["small", "2", "shares=[0.5,0.1]"], "shares must grow"),
        (["status", "small"], "there is no rollout of small; `shoal rollout small NUMBER` begins one."),
        (["promote", "small"], "there is no rollout of small"),
    ],
)
def test_mistakes_get_a_sentence(place: Path, command: Command, arguments: list[str], sentence: str) -> None:
    outcome = command("rollout", *arguments, "--store", place)
    assert outcome.status == 2
    assert sentence in outcome.err
    assert "Traceback" not in outcome.err


@pytest.fixture
def served(place: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of `shoal serve --model small`, as a process."""
    port = free_port()
    # A job on a cluster inherits what its nodes were started with.
    environment = {**os.environ, "SHOAL_LOGS": str(tmp_path / "logs"), **ENVIRONMENT}
    environment.pop("RAY_ADDRESS", None)
    settings = [
        f"serve.port={port}",
        "serve.cpus=0.5",
        "serve.max_replicas=2",
        "serve.engine=torch",
        "serve.precision=fp32",
        "serve.drain_s=1",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "shoal", "serve", "--model", "small", "--store", str(place), *settings],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "small@stable is followed" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.mark.slow
def test_a_version_is_rolled_out_and_back_while_clients_ask(served: str, place: Path, tmp_path: Path) -> None:
    registry = Registry(Store.open(str(place)))
    draw = Random(1)
    labelled = tmp_path / "labelled.jsonl"
    rows = [{"text": draw.choice(CORPUS), "sentiment": "negative"} for _ in range(40)]
    labelled.write_text("\n".join(map(json.dumps, rows)))

    def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "shoal", "rollout", *arguments, "--store", str(place)]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)

    gates = [f"replay={labelled}", "min_s=2", "min_requests=10", "shares=[0.2,0.6]", "latency_slack_ms=5000"]
    with Asking(served) as asking:
        until(lambda: len(asking.statuses) > 5)
        done = shoal("small", "2", *gates)
        assert done.returncode == 0, " ".join(done.stdout.split()) + done.stderr
        assert "small:1 -> small:2: promoted (all gates passed)" in done.stdout
        until(lambda: registry.aliases("small").aliases == {"stable": 2})
        until(lambda: set(asking.versions[-5:]) == {OTHER["finetune"]})
        back = shoal("rollback", "small", "--reason", "complaints")
        assert "small:1 -> small:2: rolled back (complaints)" in back.stdout, (back.stdout, back.stderr)
        until(lambda: set(asking.versions[-5:]) == {PRINTS["finetune"]})
        # A version with other weights, that agrees with nobody.
        weights = registry.store.root / registry.version("small", 2).torch / "classifier.json"
        weights.write_text(weights.read_text() + " ")
        damaged = shoal("small", "2", *gates)
        assert damaged.returncode == 1
        assert "classifier.json is damaged or changed" in damaged.stdout
    assert set(asking.statuses) == {200}
    assert httpx.get(f"{served}/v1/model").json()["registered"]["number"] == 1
