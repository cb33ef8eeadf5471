"""A sweep that was broken off and is asked for again with other settings: it would be another one, so it is told."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from upath import UPath

from cluster.claim import is_claimed
from cluster.store import RECORD, WORK, write_whole
from models.settings import InputError
from pipelines.stage import Task
from pipelines.sweeping.trial import RECORD as TRIAL

_BEGUN, _GIVEN_UP, _NAMED = "sweep.json", "given-up", 5


def begin(task: Task, *, anew: bool) -> None:
    """Notes what this sweep is, for later ones to compare with.

    Raises:
        InputError: another sweep of the same recipe was broken off, and it was not asked to begin anew.
    """
    inputs = {name: each.record.fingerprint for name, each in task.inputs.items()}
    identity = {"settings": task.settings.identity(), "inputs": inputs}
    note = task.work / _BEGUN
    for other in () if note.exists() else _broken_off(task):
        if anew:
            write_whole(other / WORK / _GIVEN_UP, "")
            continue
        before = json.loads((other / WORK / _BEGUN).read_text(encoding="utf-8"))
        trials = sum(1 for _ in (other / WORK).glob(f"trials/*/{TRIAL}"))
        changes = list(_changes(before["identity"]["settings"], identity["settings"]))
        for name, fingerprint in inputs.items():
            if before["identity"]["inputs"].get(name) != fingerprint:
                changes.append(f"what {name} made is another")
        changes = changes or ["the encoder, or the version of Shoal, is another"]
        named = "; ".join(changes[:_NAMED]) + (f" and {len(changes) - _NAMED} more" if len(changes) > _NAMED else "")
        raise InputError(
            f"a sweep of this recipe was broken off after {trials} trials, but the recipe has changed since: {named}. "
            "Undo that to go on with it, or set sweep.anew=true to begin another."
        )
    task.work.mkdir(parents=True, exist_ok=True)
    (task.work / _GIVEN_UP).unlink(missing_ok=True)
    write_whole(note, json.dumps({"recipe": task.recipe, "identity": identity}))


def _broken_off(task: Task) -> Iterator[UPath]:
    """Other sweeps of the same recipe that were begun and not ended, and that nobody is at work on."""
    if not task.out.parent.exists():
        return
    for folder in sorted(task.out.parent.iterdir(), key=str):
        note = folder / WORK / _BEGUN
        unfinished = folder.name != task.out.name and note.exists() and not (folder / WORK / _GIVEN_UP).exists()
        of_this = unfinished and json.loads(note.read_text(encoding="utf-8"))["recipe"] == task.recipe
        # Looked for in this order: one that ends meanwhile is not taken for one that was broken off.
        if of_this and not is_claimed(folder) and not (folder / RECORD).exists():
            yield folder


def _changes(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """What differs, by path."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            yield from _changes(before.get(name), after.get(name), f"{path}.{name}".removeprefix("."))
    elif before != after:
        yield f"{path} was {json.dumps(before)} and is {json.dumps(after)}"
