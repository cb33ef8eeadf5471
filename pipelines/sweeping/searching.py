"""The search: Optuna or chance proposes values, Ray Tune runs the trials, and what falls behind at a rung is stopped.

What trials find is theirs to keep (`pipelines.sweeping.trial`); that one has ended, and why, is written here. A sweep
that is begun again tells the searcher and the scheduler what ended trials had found, goes on with those that had not
ended, and proposes as many more as are wanted.
"""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import ray
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from upath import UPath

from cluster.connect import room_for
from cluster.memory import training_environment
from cluster.store import STORAGE_ERRORS, ClusterError, remove_tree, write_whole
from models.settings import InputError
from pipelines.progress import Progress
from pipelines.sweeping.showing import Shown, showing
from pipelines.sweeping.trial import FAILED, RUNG, SCORE, TIME, TRUNK, WHOLE, Trial, TrialJob, records, time_of
from pipelines.training.workers import storage_of

if TYPE_CHECKING:
    from pipelines.sweep import SweepSettings

_ENDED = "ended.json"
SearchName = Literal["tpe", "random"]
StopName = Literal["asha", "median", "none"]


def run_trials(job: TrialJob, sweep: "SweepSettings", progress: Progress) -> list[dict[str, Any]]:
    """Runs trials until as many have ended as are wanted; gives what each found, in the order in which they were begun.

    Raises:
        ClusterError: trials were lost again and again.
        InputError: no trial could be trained.
    """
    settings = job.lesson.settings
    gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
    room_for(settings.threads, gpus, "a trial", "finetune.threads")
    known = records(job)
    ended = [each for each in known if (job.folder(each["values"]) / _ENDED).exists()]
    begun = [each for each in known if each not in ended]
    given = [dict(point) for point in sweep.start if all(each["values"] != point for each in known)]
    left = sweep.trials - len(ended)
    before = [(each, why_ended(job, each["values"])) for each in ended]
    with showing(progress, sweep.trials, settings.metric, before) as shown:
        if left > 0:
            points = [*(each["values"] for each in begun), *given][:left]
            _tune(job, sweep, (ended, begun), points, left, gpus, shown)
    found = records(job)
    if all(each["rungs"][-1].get(FAILED) for each in found):
        raise InputError(f"no trial could be trained: {found[0]['rungs'][-1][FAILED]}")
    return found


def _tune(
    job: TrialJob,
    sweep: "SweepSettings",
    known: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    points: list[dict[str, Any]],
    left: int,
    gpus: int,
    shown: Shown,
) -> None:
    settings, (ended, begun) = job.lesson.settings, known
    seed = sweep.seed + len(ended) + len(begun)  # What was proposed before is not to be proposed again.
    sampler: BaseSampler = (
        RandomSampler(seed=seed)
        if sweep.search == "random"
        else TPESampler(seed=seed, n_startup_trials=max(sweep.trials // 4, 4), multivariate=True, constant_liar=True)
    )
    distributions = {path: each.optuna for path, each in sweep.space.items()}
    searcher = _Proposing(distributions, metric=SCORE, mode="max", points_to_evaluate=points or None, sampler=sampler)
    scheduler = _scheduler(sweep.stop, job.rungs, job.reduction)
    for number, each in enumerate(ended):
        scores, whole = [rung[SCORE] for rung in each["rungs"]], each["rungs"][-1][WHOLE]
        # Optuna counts them from 0, and a trial's own reports from 1.
        searcher.add_evaluated_point(
            each["values"], scores[-1], pruned=not whole, intermediate_values=[scores[0], *scores]
        )
        _replay(scheduler, f"ended-{number}", each["rungs"], job.reduction)
    for number, each in enumerate(begun):  # They themselves tell their last rung again.
        _replay(scheduler, f"begun-{number}", each["rungs"][:-1], job.reduction)
    trainable = tune.with_resources(
        tune.with_parameters(Trial, job=job), {"cpu": float(settings.threads), "gpu": float(gpus)}
    )
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # It would take Ctrl-C for the wish to stop trials and go on.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Else it prints tables of its own, however quiet it is asked to be.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # Lost trials are told here.
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=left,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            callbacks=[_Watching(job, shown)],
            verbose=0,
            **storage_of(job.work),
        ),
    )
    # Tune has no public way to say what a trial's process needs.
    environment = {} if gpus else training_environment()
    with mock.patch.dict(class_cache.DEFAULT_ENV_VARS, environment), warnings.catch_warnings():
        # A trial that goes on tells its last rung again.
        warnings.filterwarnings("ignore", "The reported value is ignored", UserWarning)
        results = tuner.fit()
    if results.errors:
        raise ClusterError(f"{len(results.errors)} trials were lost: {results.errors[0]}; run the same command again.")


def _scheduler(stop: StopName, rungs: int, reduction: float) -> TrialScheduler:
    match stop:
        case "asha":  # Li et al. 2020, arXiv 1810.05934.
            most = time_of(rungs - 1, reduction) + 1
            return AsyncHyperBandScheduler(
                TIME, SCORE, "max", max_t=most, grace_period=time_of(0, reduction), reduction_factor=reduction
            )
        case "median":  # Golovin et al. 2017.
            never: Any = float("inf")  # Trials are not paused for others' sake.
            return MedianStoppingRule(RUNG, SCORE, "max", grace_period=1, min_samples_required=4, min_time_slice=never)
        case "none":
            return FIFOScheduler()


def _replay(scheduler: TrialScheduler, name: str, rungs: Sequence[Mapping[str, Any]], reduction: float) -> None:
    """Tells a scheduler what a trial of an earlier command had told."""
    if isinstance(scheduler, FIFOScheduler) and not isinstance(scheduler, AsyncHyperBandScheduler | MedianStoppingRule):
        return
    if not rungs:
        return
    trial: Any = _Earlier(name)
    nobody: Any = SimpleNamespace(get_live_trials=list, get_trials=list)
    results = [{**rung, TIME: time_of(place, reduction)} for place, rung in enumerate(rungs)]
    scheduler.on_trial_add(nobody, trial)
    for result in results:
        scheduler.on_trial_result(nobody, trial, result)
    scheduler.on_trial_complete(nobody, trial, results[-1])


@dataclass(frozen=True)
class _Earlier:
    """What a scheduler wants to know of a trial."""

    trial_id: str
    status: str = "TERMINATED"


class _Proposing(OptunaSearch):
    """Optuna, which is told that a trial was stopped, not that its last score is all that it is worth."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Without a result, Tune's bridge calls the trial pruned: of such, the sampler compares rungs first."""
        super().on_trial_complete(trial_id, result if result and result[WHOLE] else None, error)


class _Watching(tune.Callback):
    """Hears of the trials in the command's own process."""

    def __init__(self, job: TrialJob, shown: Shown) -> None:
        self._job, self._shown = job, shown

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes its callbacks down, and this one is of no use but in the command's own process."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._shown.began(trial.trial_id, trial.config)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._shown.found(trial.trial_id, result)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._shown.lost(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        why = self._shown.ended(trial.trial_id)
        folder: UPath = self._job.folder(trial.config)
        with contextlib.suppress(*STORAGE_ERRORS):  # It would be told once more, and end again.
            write_whole(folder / _ENDED, json.dumps({"why": why}))
            remove_tree(folder / TRUNK)


def why_ended(job: TrialJob, values: Mapping[str, Any]) -> str:
    """Why a trial has ended, as it was told."""
    path = job.folder(values) / _ENDED
    return str(json.loads(path.read_text(encoding="utf-8"))["why"]) if path.exists() else "did not end"
