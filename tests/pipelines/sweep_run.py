"""A sweep on a cluster of several raylets that grows and then loses a node, with all that runs on it.

A program of its own, for a process has one Ray: `python -m tests.pipelines.sweep_run FOLDER` prints what came of it as
a line of JSON.
"""

import contextlib
import io
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.connect import ENVIRONMENT, UNWATCHED

os.environ |= ENVIRONMENT | UNWATCHED

import psutil
import ray
from rich.console import Console
from upath import UPath

from pipelines import sweep
from pipelines.finetune import FinetuneSettings
from pipelines.progress import Progress
from pipelines.stage import Task
from pipelines.sweep import SweepSettings, SweepStageSettings
from tests.pipelines.playground import Playground
from tests.pipelines.tiny import artifact, make_encoder, make_prepared

PATIENCE_SECONDS = 120.0


def main(folder: Path) -> dict[str, Any]:
    """How many trials came to the end, and what was told, where two ran at once when there was room for them."""
    make_prepared(folder / "prepared", rows={"train": 192, "validation": 64, "test": 8}, noise=0.2, chunk_rows=16)
    make_encoder(folder / "encoder")
    playground = Playground(1)
    ray.init(address=playground.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    chosen = SweepStageSettings(
        sweep=SweepSettings(trials=6, stop="none", rungs=4),
        finetune=FinetuneSettings(encoder=str(folder / "encoder"), epochs=40, microbatch=4, trackers=()),
    )
    out, said = folder / "sweep", io.StringIO()
    out.mkdir()
    inputs = {"prepare": artifact(folder / "prepared", "prepare")}
    task = Task(chosen, inputs, UPath(out), Progress(Console(file=said, width=1000)), "toy")
    found: list[dict[str, Any]] = []
    running = threading.Thread(target=lambda: found.append(sweep.run(task)), daemon=True)
    running.start()
    records = out / "work" / "trials"
    until(lambda: any(records.glob("*/trial.json")))
    playground.add()
    until(lambda: at_work() == 2)
    playground.host()
    running.join(4 * PATIENCE_SECONDS)
    return {"finished": found[0]["finished"], "told": said.getvalue()}


def at_work() -> int:
    """How many processes train a trial."""
    count = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # Others come and go meanwhile.
            count += " ".join(process.cmdline()).startswith("ray::ResourceTrainable.train")
    return count


def until(holds: Callable[[], bool]) -> None:
    """Waits for it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
