"""sweep: searches settings of the fine-tuning (Ray Tune), and wastes nothing.

All trials train on the one prepared dataset. A trial is scored at rungs (`pipelines.sweeping.ladder`), each of which is
worth a finished run of its budget, and stopped where it falls behind. The artifact has `best.yaml`, the settings
that `finetune` takes over by itself, `trials.json` and `report.html`.
"""

import json
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.store import telling_storage_errors, write_whole
from models.settings import Settings, execution
from pipelines import finetune
from pipelines.finetune import FinetuneSettings, lesson_of
from pipelines.prepared import Prepared
from pipelines.stage import Task
from pipelines.sweeping.best import BEST
from pipelines.sweeping.board import SCORE, TEXTS, WHOLE, StopName
from pipelines.sweeping.proposing import SearchName
from pipelines.sweeping.report import importances, worth, write_hparams, write_report
from pipelines.sweeping.resuming import begin
from pipelines.sweeping.searching import run_trials
from pipelines.sweeping.showing import told_values
from pipelines.sweeping.space import Distribution, with_values
from pipelines.sweeping.trial import TrialJob

NAME = "sweep"
FORMAT = 3

_SECTION = "finetune"
_TELLING_TEXTS = 400
"""With 224 a sweep of 1,000 tweets was seen to end 6 points of macro-F1 lower than with one rung less, with 490 not."""
_FIXED = {
    "epochs": "decides how long a trial is, and trials of other lengths cannot be compared",
    "schedule": "is wsd in every trial, so that it does not depend on where one is stopped",
    "patience": "would end trials at other places than their rungs",
    "encoder": "decides what the data is prepared for, and all trials share one prepared dataset",
    "teacher": "says of each row, once for all trials, what they learn from",
    "metric": "is what trials are compared by",
    "threads": "decides how much room a trial takes, which is the same for all",
}


class SweepSettings(Settings):
    """What is searched, and how."""

    space: dict[str, Distribution] = Field(
        {
            "finetune.learning_rate": Distribution(log_uniform=(1e-5, 1e-3)),
            "finetune.warmup": Distribution(uniform=(0.0, 0.2)),
        },
        description="Settings of finetune by their paths, each with log_uniform, uniform or int (bounds) or choice.",
    )
    trials: int = Field(16, ge=1, description="How many sets of values are tried.")
    search: SearchName = Field("tpe", description="What proposes values: Optuna's TPE, or chance.")
    stop: StopName = Field(
        "asha",
        description="Which trials go on from a rung: asha (the best third, say), median (the better half), none (all).",
    )
    rungs: int = Field(3, ge=1, le=8, description="How often a trial is scored, the last time as a full run.")
    reduction: float = Field(
        3.0, gt=1, description="A rung's budget against that of the rung before; one in so many goes on with asha."
    )
    start: tuple[dict[str, Any], ...] = Field((), description="Values to begin with, as {PATH: VALUE} for each path.")
    seed: int = Field(0, ge=0, description="Of the proposals.")
    anew: bool = execution(
        False, description="Whether to begin though another sweep of this recipe, since changed, was broken off."
    )
    max_failures: int = execution(8, ge=0, description="How often a trial may be lost with its node.")

    @field_validator("space")
    @classmethod
    def _not_empty(cls, space: dict[str, Distribution]) -> dict[str, Distribution]:
        if not space:
            raise ValueError("is empty: name at least one setting, for example finetune.learning_rate")
        return space

    @model_validator(mode="after")
    def _start_in_space(self) -> Self:
        if len(self.start) > self.trials:
            raise ValueError(f"start: has {len(self.start)} points, and there are only {self.trials} trials")
        for number, point in enumerate(self.start):
            if set(point) != set(self.space):
                raise ValueError(f"start.{number}: must have a value for each of {', '.join(self.space)}, and no other")
            for path, value in point.items():
                if not self.space[path].holds(value):
                    raise ValueError(f"start.{number}: {value!r} is not in sweep.space for {path}")
        return self


class SweepStageSettings(Settings):
    """All that decides what a sweep finds: its own settings and those of the fine-tuning that it varies."""

    sweep: SweepSettings
    finetune: FinetuneSettings

    def identity(self) -> dict[str, Any]:
        """Without the fine-tuning's settings that trials have their own values for."""
        found = super().identity()
        for path in (*self.sweep.space, "finetune.schedule", "finetune.patience"):
            *parts, name = path.split(".")
            place: Any = found
            for part in parts:
                place = place.get(part) if isinstance(place, dict) else None
            if isinstance(place, dict):
                place.pop(name, None)
        return found


def space_problem(sweep: SweepSettings, finetune: FinetuneSettings) -> str | None:
    """What is wrong with a space for this fine-tuning; None where nothing is."""
    if finetune.fsdp:
        return "finetune.fsdp: a sweep trains each trial on one worker, where a model cannot be sharded; leave one out"
    for path, distribution in sweep.space.items():
        section, _, name = path.partition(".")
        first, *rest = name.split(".")
        if section != _SECTION or not name:
            return f"sweep.space: {path!r} is no setting of finetune; all trials share what comes before it"
        if not rest and first in _FIXED:
            return f"sweep.space: {path} {_FIXED[first]}"
        field = FinetuneSettings.model_fields.get(first)
        if field and isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("execution"):
            return f"sweep.space: {path} says how a run is carried out and changes nothing of what comes of it"
        for value in distribution.samples:
            try:
                varied = with_values(finetune, {path: value}, _SECTION)
                if varied.workers.max > varied.lanes:
                    return f"sweep.space: {path} cannot be {value}: finetune.workers may be {varied.workers.max}"
            except ValidationError as error:
                # Of the branches of a union, the one that the value went furthest into was meant.
                reason = max(error.errors(), key=lambda each: len(each["loc"]))
                if reason["type"] == "extra_forbidden":
                    return f"sweep.space: {path} is no setting"
                return f"sweep.space: {path} cannot be {value}: {reason['msg'].removeprefix('Value error, ')}"
            except (KeyError, TypeError):
                return f"sweep.space: {path} is no setting"
    return None


def externals(settings: SweepStageSettings) -> dict[str, str]:
    """What the fine-tuning needs from outside the store."""
    return finetune.externals(settings.finetune)


def run(task: Task) -> dict[str, Any]:
    """Searches into `task.out`.

    Raises:
        InputError: the settings do not fit the data, or no trial could be trained.
        ClusterError: trials were lost again and again, or nothing more can be written.
    """
    settings: SweepStageSettings = task.settings
    sweep = settings.sweep
    with telling_storage_errors(str(task.out)):
        begin(task, anew=sweep.anew)
    varied = settings.finetune.model_copy(update={"schedule": "wsd"})
    lesson = lesson_of(task, varied)
    job = TrialJob(lesson, task.work, sweep.rungs, sweep.reduction)
    texts = varied.epochs * Prepared(lesson.prepared).index.splits["train"].rows
    if sweep.rungs > 1 and (first := texts / sweep.reduction ** (sweep.rungs - 1)) < _TELLING_TEXTS:
        task.progress.tell(
            f"  the first rung has only some {first:.0f} texts, too few to tell good settings from bad ones; lower "
            "sweep.rungs",
            "yellow",
        )
    trials = run_trials(job, sweep, task.progress)
    whole = [each for each in trials if each["rungs"][-1][WHOLE]]
    best = max(trials, key=worth)
    # What trials had beside their own values.
    fixed = {"finetune.schedule": "wsd", "finetune.decay": varied.decay, "finetune.patience": None}
    values = {**fixed, **best["values"]}
    with telling_storage_errors(str(task.out)):
        write_whole(task.out / BEST, yaml.safe_dump(values, sort_keys=False))
        write_whole(task.out / "trials.json", json.dumps(trials, indent=1))
    weights = importances(sweep.space, trials)
    metrics = {
        "trials": len(trials),
        "finished": len(whole),
        "best_score": best["rungs"][-1][SCORE],
        **{f"best.{path}": value for path, value in best["values"].items()},
        **{f"importance.{path}": round(value, 4) for path, value in weights.items()},
        "texts_trained": sum(each["rungs"][-1][TEXTS] for each in trials),
    }
    with telling_storage_errors(str(task.out)):
        write_report(task.out, task.recipe, settings.finetune.metric, sweep.space, trials, weights, metrics)
        write_hparams(task.out, settings.finetune.metric, trials)
    rows: list[tuple[str, ...]] = [("best", f"{metrics['best_score']:.4f}", told_values(best["values"]))]
    rows.append(("trials", f"{len(trials)}", f"{len(whole)} of them to the end"))
    rows.append(("texts trained on", f"{metrics['texts_trained']:,}", "by all of them"))
    task.progress.table(f"validation {settings.finetune.metric}", rows)
    return metrics
