"""Carrying out a recipe: its plan, its stages on Ray, and Ray's noise kept out of sight.

What takes seconds to import is imported where it is needed: `shoal --help` should not wait for torch.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cluster.logs import CommandLog, Terminal
from cluster.store import Artifact, Store
from models.settings import InputError
from recipes.printing import console_on, plain_table

if TYPE_CHECKING:
    from pipelines.progress import Progress
    from pipelines.stage import PlannedStage
    from recipes.recipe import Recipe

LOG = CommandLog()
"""Of this process's command."""

ended_by: list[signal.Signals] = []
"""The signal that told it to end, if one did."""


def planned(recipe: Path, overrides: Sequence[str] | None) -> "tuple[Recipe, Store, dict[str, PlannedStage]]":
    """A recipe, its store and its stages.

    Raises:
        InputError: it is wrong, or its store cannot be written to.
    """
    from recipes.loading import load_recipe
    from recipes.planning import plan

    loaded = load_recipe(recipe, overrides or ())
    return loaded, Store.open(durable(loaded.store)), plan(loaded)


def durable(store: str) -> str:
    """`store`, but a relative one under the home folder inside a Ray job, whose working folder Ray removes."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or "://" in store or Path(store).expanduser().is_absolute():
        return store
    return str(Path.home() / store)


def complete_until(recipe: Path, overrides: Sequence[str] | None, until: str | None) -> None:
    """Completes the stages up to `until` (all of them where it is None) and prints what came of each."""
    from pipelines.stage import complete
    from recipes.listing import headline

    loaded, store, stages = planned(recipe, overrides)
    last = until or list(stages)[-1]
    if last not in stages:
        raise InputError(f"the recipe has no stage {last}; it has {', '.join(stages)}.")
    wanted = list(stages)[: list(stages).index(last) + 1]
    reused = {name for name in wanted if store.find(stages[name].name, stages[name].fingerprint)}
    if last not in reused:
        with working(loaded.store) as terminal:
            complete(stages[last], store, progress_on(terminal.err), loaded.name)
    rows = [
        (name, "reused" if name in reused else "made", str(artifact.path), headline(artifact.record.metrics))
        for name in wanted
        if (artifact := store.find(stages[name].name, stages[name].fingerprint))
    ]
    console_on().print(plain_table(rows))


def completed_parts(
    recipe: Path, overrides: Sequence[str] | None, wanted: Sequence[str]
) -> "tuple[Recipe, Store, dict[str, Artifact]]":
    """A recipe, its store, and the artifacts of the wanted stages, as far as it has them.

    Ray is started only where one of these is missing.
    """
    loaded, store, stages = planned(recipe, overrides)
    parts = {name: stages[name] for name in wanted if name in stages}
    found = {name: store.find(stage.name, stage.fingerprint) for name, stage in parts.items()}
    there = {name: artifact for name, artifact in found.items() if artifact}
    if len(there) == len(parts):
        return loaded, store, there
    with working(loaded.store) as terminal:
        return loaded, store, completed(parts, store, progress_on(terminal.err), loaded.name)


@contextlib.contextmanager
def working(store: str, *, watched: bool = False) -> Iterator[Terminal]:
    """Connects to Ray and sends all noise to the log; what the block itself has to say goes to the terminal.

    `watched`: it may go on for weeks, and somebody reads Ray's own metrics.
    """
    from cluster.connect import connected, require_shared

    with LOG.capturing() as terminal, connected(watched=watched):
        require_shared(store)
        # Ray would abort the process on SIGTERM, and the nodes' processes would hear of it late.
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            yield terminal
        except SystemExit as left:  # How Ray Train answers Ctrl-C.
            raise KeyboardInterrupt from left
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _terminate(*_: object) -> None:
    ended_by.append(signal.SIGTERM)
    raise KeyboardInterrupt


def completed(
    stages: "dict[str, PlannedStage]", store: Store, progress: "Progress", recipe: str
) -> "dict[str, Artifact]":
    """Completes all stages and gives their artifacts."""
    from pipelines.stage import complete

    return {name: complete(stage, store, progress, recipe) for name, stage in stages.items()}


def stay(meanwhile: Callable[[], bool] | None = None, seconds: float = 5.0) -> None:
    """Until Ctrl-C or SIGTERM, which interrupt `meanwhile` too: it is called after every so many seconds, and says
    whether to go on.
    """
    asked, at_work = threading.Event(), False

    def end(*_: object) -> None:
        asked.set()
        if at_work:
            raise KeyboardInterrupt

    before = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not asked.wait(seconds if meanwhile else None):
            assert meanwhile is not None
            with contextlib.suppress(KeyboardInterrupt):
                at_work = True
                if not meanwhile():
                    return
            at_work = False
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def progress_on(file: IO[str]) -> "Progress":
    """Bars where it is a terminal, a line now and then elsewhere."""
    from pipelines.progress import Progress

    return Progress(console_on(file))
