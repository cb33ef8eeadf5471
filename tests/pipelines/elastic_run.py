"""One fine-tuning run on a cluster of several raylets whose workers and nodes are killed, drained and added meanwhile.

A program of its own, for a process has one Ray: `python -m tests.pipelines.elastic_run FOLDER SEED EVENT...` runs it
undisturbed with one worker, then disturbed with one to three, and prints what came of both as a line of JSON.
"""

import json
import logging
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cluster.connect import ENVIRONMENT, UNWATCHED

os.environ |= ENVIRONMENT | UNWATCHED

import ray
import torch
from safetensors.torch import load_file

from cluster.store import Artifact, Record, Store
from pipelines import finetune
from pipelines.audit import audit
from pipelines.finetune import FinetuneSettings
from pipelines.progress import Progress
from pipelines.stage import Task
from tests.making import make_encoder, make_prepared
from tests.pipelines.playground import Playground

PATIENCE_SECONDS = 120.0


def main(folder: Path, seed: int, events: list[str]) -> dict[str, Any]:
    """Both runs; what is equal, and what disturbed the second."""
    playground = Playground(3)
    ray.init(address=playground.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    store = Store.open(str(folder / "store"))
    prepared = make_prepared(store, rows=1000)
    encoder = make_encoder(folder / "encoder", width=64)

    def run(name: str, **settings: Any) -> Artifact:
        chosen = FinetuneSettings(
            encoder=str(encoder), microbatch=4, epochs=2 + 5 * len(events), trackers=(), resize_seconds=5, **settings
        )
        out = store.folder("finetune", name)
        metrics = finetune.run(Task(chosen, {"prepare": prepared}, out, Progress(), "elastic"))
        inputs = {"prepare": prepared.record.fingerprint}
        return store.commit(Record("finetune", name, chosen.identity(), inputs, {}, metrics))

    calm = run("calm", workers=1, checkpoint_seconds=60)
    wild: list[Artifact] = []
    running = threading.Thread(
        target=lambda: wild.append(run("wild", workers={"min": 1, "max": 3}, checkpoint_seconds=2)), daemon=True
    )
    running.start()
    draw, work = random.Random(seed), Path(store.folder("finetune", "wild").path) / "work"
    furthest, groups = -1, 0
    for event in events:
        furthest = _gets_on(work, furthest, groups + 1, running)
        groups = len(_groups(work))
        time.sleep(draw.uniform(0, 4))
        print(f"{time.strftime('%H:%M:%S')} {event} at step {furthest}", file=sys.stderr, flush=True)
        getattr(playground, event)()
        if event == "add" and len(playground.nodes) > 3:
            groups -= 1  # There is no room for more workers, and the group stays.
    running.join()
    (disturbed,) = wild
    ours, theirs = (load_file(str(artifact.path / "model" / "model.safetensors")) for artifact in (disturbed, calm))
    histories = [json.loads((artifact.path / "history.json").read_text()) for artifact in (disturbed, calm)]
    return {
        "same_weights": all(torch.equal(ours[name], theirs[name]) for name in theirs),
        "same_history": histories[0] == histories[1],
        "audits": [audit(artifact, store).sentence for artifact in (disturbed, calm)],
        "groups": json.loads((disturbed.path / "groups.json").read_text()),
    }


def _gets_on(work: Path, furthest: int, groups: int, running: threading.Thread) -> int:
    """Waits until so many groups of workers have begun and one took a checkpoint that is further; gives how far."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        assert running.is_alive(), "it ended before all events"
        found = [int(path.parent.name.split("-")[0]) for path in work.glob("checkpoints/*/checkpoint.json")]
        if len(_groups(work)) >= groups and (now := max(found, default=-1)) > furthest:
            return now
        time.sleep(0.1)
    raise TimeoutError(f"nothing new in {PATIENCE_SECONDS:g} s")


def _groups(work: Path) -> list[Any]:
    file = work / "groups.json"
    return json.loads(file.read_text()) if file.exists() else []  # type: ignore[no-any-return]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
    sys.stdout.flush()
    os._exit(0)  # What is left of the cluster ends with its group of processes.
