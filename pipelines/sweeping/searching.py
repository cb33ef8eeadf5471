"""The search: Ray Tune runs the trials, each of its own from one rung to the next; who goes on is decided here.

What trials find is theirs to keep (`pipelines.sweeping.trial`). A sweep that is begun again reads it, goes on with
those that are good enough, and proposes as many more as are wanted.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from cluster.connect import room_for
from cluster.memory import training_environment
from cluster.store import STORAGE_ERRORS, ClusterError, remove_tree
from models.settings import InputError, first_line
from pipelines.progress import Progress
from pipelines.sweeping.board import Board, Entry, failure
from pipelines.sweeping.proposing import propose
from pipelines.sweeping.showing import Shown, showing
from pipelines.sweeping.trial import BEGAN, PLACE, RUNGS, TRUNK, VALUES, Trial, TrialJob, records, write_record
from pipelines.training.workers import storage_of

if TYPE_CHECKING:
    from pipelines.sweep import SweepSettings

_MANY, _LOOK_SECONDS = 1_000_000, 1.0


def run_trials(job: TrialJob, sweep: "SweepSettings", progress: Progress) -> list[dict[str, Any]]:
    """Runs trials until as many as are wanted were begun and the best of them have come to the end.

    Gives the `values` of each, what it was worth at its `rungs`, and why it `ended`, in the order in which they were
    begun.

    Raises:
        ClusterError: trials were lost again and again, and none came to the end.
        InputError: no trial could be trained.
    """
    settings = job.lesson.settings
    gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
    room_for(settings.threads, gpus, "a trial", "finetune.threads")
    known = [Entry(each[VALUES], each[RUNGS]) for each in records(job)]
    board = Board(sweep.stop, job.reduction, job.rungs, max(sweep.trials, len(known)), known)
    with showing(progress, settings.metric, board) as shown:
        needs = {"CPU": float(settings.threads), "GPU": float(gpus)}
        _tune(job, _Deciding(job, sweep, board, shown, needs), needs)
    if not any(entry.whole for entry in board.entries):
        if lost := next((entry.lost for entry in board.entries if entry.lost), None):
            raise ClusterError(f"trials were lost, and none came to the end: {lost}; run the same command again.")
        failed = next(entry.failed for entry in board.entries if entry.failed)
        raise InputError(f"no trial could be trained: {failed}")
    for entry in board.entries:
        if entry.lost:
            entry.rungs = [*entry.rungs, failure(entry.lost, entry.rungs[-1] if entry.rungs else None)]
    return [{"values": entry.values, "rungs": entry.rungs, "ended": board.why(entry)} for entry in board.entries]


def _tune(job: TrialJob, deciding: "_Deciding", needs: Mapping[str, float]) -> None:
    room = {name.lower(): count for name, count in needs.items()}
    trainable = tune.with_resources(tune.with_parameters(Trial, job=job), room)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # It would take Ctrl-C for the wish to stop trials and go on.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Else it prints tables of its own, however quiet it is asked to be.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(_MANY)  # How many wait for room is decided here.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # Lost trials are told here.
    scheduler = _InOrder()  # type: ignore[no-untyped-call]
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(search_alg=deciding, scheduler=scheduler, num_samples=-1, reuse_actors=True),
        run_config=tune.RunConfig(
            name="tune",
            callbacks=[_Watching(deciding)],
            verbose=0,
            **storage_of(job.work),
        ),
    )
    # Tune has no public way to say what a trial's process needs.
    environment = {} if needs["GPU"] else training_environment()
    with mock.patch.dict(class_cache.DEFAULT_ENV_VARS, environment):
        tuner.fit()


class _Deciding(Searcher):
    """What Tune asks for something to run. Each of its trials takes one of ours from where it is to the next rung."""

    def __init__(
        self, job: TrialJob, sweep: "SweepSettings", board: Board, shown: Shown, needs: Mapping[str, float]
    ) -> None:
        super().__init__(metric="score", mode="max")
        self._needs, self._room, self._looked = needs, 0, float("-inf")
        self._job, self._sweep, self._board, self._shown = job, sweep, board, shown
        self._entries: dict[str, Entry] = {}
        """By Tune's names for what they are at."""
        self._again = [entry for entry in board.entries if not entry.rungs]
        """Those that were broken off."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes it down, but all that matters stands in the trials' own records."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        """A trial to take on; None where what is running has to end first."""
        board = self._board
        # One more than there is room for, so that a cluster that can grow does.
        if sum(entry.running for entry in board.entries) > self._room_now():
            return None
        entry = self._again.pop(0) if self._again else board.next()
        if entry is None and len(board.entries) < board.wanted:
            sweep = self._sweep
            values = propose(sweep.search, sweep.space, sweep.start, board.entries, sweep.trials, sweep.seed)
            if values is None:
                board.wanted = len(board.entries)
                board.settle()
                self._shown.tell(f"all of sweep.space has been tried: {board.wanted} sets of values")
            else:
                entry = Entry(values)
                board.entries.append(entry)
                with contextlib.suppress(*STORAGE_ERRORS):  # A sweep that is broken off and goes on would not know it.
                    write_record(self._job.folder(values), {VALUES: values, BEGAN: time.time(), RUNGS: []})
        if entry is None and len(board.entries) >= board.wanted:
            entry = board.last()
        if entry is None:
            return None if board.running else Searcher.FINISHED
        entry.running = True
        self._entries[trial_id] = entry
        self._shown.update()
        return {VALUES: dict(entry.values), PLACE: len(entry.rungs)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: there is one, told at the end."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial was scored; or lost, of which `lost` hears as well."""
        if error or result is None:
            return
        entry = self._entries[trial_id]
        entry.rungs, entry.running = json.loads(result[RUNGS]), False
        over = self._board.settle(afresh=bool(entry.failed)) + ([entry] if entry.whole or entry.failed else [])
        self._shown.scored(entry)
        for each in over:
            with contextlib.suppress(*STORAGE_ERRORS):  # It only takes room.
                remove_tree(self._job.folder(each.values) / TRUNK)

    def lost(self, trial_id: str, error: BaseException | None) -> None:
        """A trial's process or node is gone, or it raised what it should not: it is tried again, but not for ever."""
        entry = self._entries[trial_id]
        cause = getattr(error, "cause", None)
        why = f"{type(cause).__name__}: {first_line(cause)}" if cause else "its process or its node is gone"
        # What a program raises it will most likely raise again.
        often = self._sweep.max_failures if cause is None or isinstance(cause, STORAGE_ERRORS) else 1
        entry.losses += 1
        entry.running = False
        if entry.losses <= often:
            self._again.append(entry)
            self._shown.again(entry, why)
            return
        entry.lost = why
        self._board.settle(afresh=True)
        self._shown.lost(entry)

    def _room_now(self) -> int:
        """How many trials the nodes that there are hold."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            wanted = [(name, count) for name, count in self._needs.items() if count]
            self._room = sum(min(int(node.get(name, 0) // count) for name, count in wanted) for node in nodes)
            self._looked = time.monotonic()
        return self._room

    def save(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing either."""


class _InOrder(FIFOScheduler):
    """Gives a process that comes free to the first trial that waits for room, not to one whose own is starting up.

    That one would be given up, and where trials take less time than a process takes to start there would never be more
    than one.
    """

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """None where all that wait have their own."""
        actors, manager = tune_controller._trial_to_actor, tune_controller._actor_manager
        for trial in tune_controller.get_trials():
            starts = trial in actors and manager.is_actor_started(actors[trial])
            if trial.status == "PENDING" and not starts:
                return trial
        return None


class _Watching(tune.Callback):
    """Hears what becomes of the trials' processes."""

    def __init__(self, deciding: _Deciding) -> None:
        self._deciding = deciding

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes its callbacks down, and this one is of no use but in the command's own process."""
        return {}

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        error = None
        with contextlib.suppress(Exception):  # It stands in the store, which may be what is out of reach.
            error = trial.get_pickled_error()
        self._deciding.lost(trial.trial_id, error)
