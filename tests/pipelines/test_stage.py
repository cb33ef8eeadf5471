"""Stages and their artifacts: each is made once, however many runs want it at the same time."""

import threading
import time
from pathlib import Path
from typing import Any

from cluster.store import Artifact, Store
from models.settings import Settings
from pipelines.progress import Progress
from pipelines.stage import PlannedStage, Task, complete


class _Counting:
    """A stage that takes its time and counts how often it was run."""

    NAME = "count"
    FORMAT = 1

    def __init__(self) -> None:
        self.runs = 0

    def externals(self, settings: Any) -> dict[str, str]:
        return {}

    def run(self, task: Task) -> dict[str, Any]:
        self.runs += 1
        task.work.mkdir(parents=True)
        (task.work / "begun").write_text("")
        time.sleep(1)
        (task.out / "result").write_text("x")
        return {"runs": self.runs}


def test_runs_that_want_the_same_artifact_make_it_once(tmp_path: Path) -> None:
    store, stage = Store.open(str(tmp_path)), _Counting()
    made: list[Artifact] = []

    def run() -> None:
        made.append(complete(PlannedStage(stage, Settings()), store, Progress(), "any"))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stage.runs == 1
    assert [artifact.record.metrics for artifact in made] == [{"runs": 1}] * 3
    assert sorted(entry.name for entry in made[0].path.iterdir()) == ["artifact.json", "result"]
    assert [entry.name for entry in made[0].path.parent.iterdir()] == [made[0].path.name]
    assert list(store.artifacts()) == made[:1]
