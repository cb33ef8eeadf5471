"""What a stage is, how its artifact is named, and how it is run.

A stage is a module with

    NAME      its verb
    FORMAT    an integer, raised when what it writes for the same settings changes
    externals(settings) -> dict[str, str]   identities of what it reads from outside the store
    run(task) -> dict[str, Any]             does the work into `task.out` and returns its metrics

`run` may be killed at any moment and called again with the same task: it goes on from what it finds in
`task.work`, or starts anew, and must end with the same result. The record is written here, afterwards.
"""

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from upath import UPath

from cluster.claim import claimed
from cluster.store import WORK, Artifact, Record, Store, remove_tree
from models.settings import Settings
from pipelines.progress import Progress

_VERSIONED = ("ray", "torch", "transformers", "tokenizers", "datasets", "pyarrow")


@dataclass(frozen=True)
class Task:
    """One stage to run: its settings, the artifacts it builds on and where its output goes."""

    settings: Any
    inputs: Mapping[str, Artifact]
    out: UPath
    progress: Progress
    recipe: str = ""

    @property
    def work(self) -> UPath:
        """A folder for what must outlive a crash but is no part of the artifact; removed at the end."""
        return self.out / WORK


class Stage(Protocol):
    """The form of a stage's module."""

    NAME: str
    FORMAT: int

    def externals(self, settings: Any) -> dict[str, str]: ...

    def run(self, task: Task) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its settings and its fingerprint: what will run, known before anything runs."""

    stage: Stage
    settings: Settings
    inputs: tuple["PlannedStage", ...] = ()
    externals: Mapping[str, str] = field(default_factory=dict)
    role: str = ""
    """What it is to those that build on it, where that is not its verb."""

    @property
    def name(self) -> str:
        """The stage's verb."""
        return self.stage.NAME

    @property
    def lineage(self) -> dict[str, str]:
        """The identities of all inputs, from the store and from outside."""
        return {each.role or each.name: each.fingerprint for each in self.inputs} | dict(self.externals)

    @property
    def fingerprint(self) -> str:
        """Names the artifact: equal settings, inputs and format give the same one, on any machine."""
        identity = [self.name, self.stage.FORMAT, self.settings.identity(), self.lineage]
        text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def complete(planned: PlannedStage, store: Store, progress: Progress, recipe: str) -> Artifact:
    """The artifact of a planned stage: found in the store, or made now with whatever it builds on.

    Where another process is making it, waits for that one.
    """
    if artifact := _finished(planned, store):
        return artifact
    inputs = {each.role or each.name: complete(each, store, progress, recipe) for each in planned.inputs}
    out = store.folder(planned.name, planned.fingerprint)
    task = Task(settings=planned.settings, inputs=inputs, out=out, progress=progress, recipe=recipe)
    with claimed(out, lambda told: progress.tell(f"{planned.name}: {told}")):
        artifact = store.find(planned.name, planned.fingerprint) or _made(planned, task, store)
        remove_tree(task.work)
    return artifact


def _finished(planned: PlannedStage, store: Store) -> Artifact | None:
    artifact = store.find(planned.name, planned.fingerprint)
    if artifact:
        remove_tree(artifact.path / WORK)  # Left where the stage was killed right after its end.
    return artifact


def _made(planned: PlannedStage, task: Task, store: Store) -> Artifact:
    started = time.monotonic()
    with task.progress.stage(planned.name):
        metrics = planned.stage.run(task)
    return store.commit(
        Record(
            stage=planned.name,
            fingerprint=planned.fingerprint,
            settings=planned.settings.identity(),
            inputs=planned.lineage,
            versions=versions(),
            metrics=metrics,
            recipe=task.recipe,
            seconds=round(time.monotonic() - started, 1),
        )
    )


def versions() -> dict[str, str]:
    """The versions that lineage records."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in ("shoal", *_VERSIONED)
    }
