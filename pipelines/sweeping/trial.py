"""A trial: one set of values, trained on the lanes that fine-tuning has, and scored at its rungs (Ray Tune).

A step of this Trainable takes the trunk to the next rung, keeps its state, decays a branch off it, scores that, and
goes back. An actor goes from trial to trial and keeps what it has imported. What was scored and the trunk's state
stand in the sweep's working folder under the values' own name: a trial that is begun again, after a lost node or a
killed command, tells what it had told and goes on from there.
"""

import gc
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from ray import tune
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from upath import UPath

from cluster.claim import claimed
from cluster.store import write_whole
from models.checkpoints import training_state
from models.encoders import set_training
from models.optimizer import wsd_rate
from models.precision import LossScale, agreed
from models.settings import InputError, first_line
from pipelines.finetune import class_weights_of
from pipelines.prepared import Prepared
from pipelines.sweeping.ladder import Rung, ladder
from pipelines.sweeping.space import with_values
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.classifying import Classifying
from pipelines.training.lanes import feed_over
from pipelines.training.worker import telling_full_memory, trainer_of

SCORE, BUDGET, RUNG, TEXTS, FAILED, TIME, WHOLE = "score", "budget", "rung", "texts", "failed", "time", "whole"
RECORD, TRUNK, _SECTION = "trial.json", "trunk", "finetune"


def time_of(rung: int, reduction: float) -> int:
    """A rung's place, from 0, as schedulers count it: in whole numbers that grow as budgets do."""
    return math.ceil(1000 * reduction**rung)


@dataclass(frozen=True)
class TrialJob:
    """All that a trial must know but its values; the same for each."""

    lesson: Classifying
    work: UPath
    rungs: int
    reduction: float

    def folder(self, values: Mapping[str, Any]) -> UPath:
        """Where a trial with these values keeps what it found."""
        text = json.dumps(dict(sorted(values.items())))
        return self.work / "trials" / hashlib.sha256(text.encode()).hexdigest()[:16]


class Trial(tune.Trainable):
    """Trained by one worker, whose bits are those that any number of workers would come to."""

    def setup(self, config: dict[str, Any], job: TrialJob | None = None) -> None:
        """Begins a trial, or goes on with it."""
        if job is not None:
            self._job = job
        self._values, self._began = config, time.time()
        self._folder = self._job.folder(config)
        # What was passed before is not told, and decided on, again.
        self._next = max(len(self._told()) - 1, 0)
        self._run: _Run | None = None
        gc.collect()  # A model and what trains it hold each other.

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial, in the same process."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Takes the trial to its next rung; what it was found to be worth there."""
        place, self._next = self._next, self._next + 1
        with claimed(self._folder, print):  # Where the same values are tried twice, the second trial reads.
            told = self._told()
            if place >= len(told):
                self._folder.mkdir(parents=True, exist_ok=True)
                told.append(self._climb(place, told[-1][TEXTS] if told else 0))
                record = {"values": self._values, "began": self._began, "rungs": told}
                write_whole(self._folder / RECORD, json.dumps(record))
        found: dict[str, Any] = told[place]
        return found | {TIME: time_of(place, self._job.reduction)}

    def _told(self) -> list[dict[str, Any]]:
        path = self._folder / RECORD
        if not path.exists():
            return []
        record = json.loads(path.read_text(encoding="utf-8"))
        self._began = record["began"]
        rungs: list[dict[str, Any]] = record["rungs"]
        return rungs

    def _climb(self, place: int, texts: int) -> dict[str, Any]:
        try:
            with telling_full_memory(self._job.lesson):
                self._run = self._run or _Run(self._job, self._values, self._folder, texts)
                return self._run.climb(place)
        except (InputError, ValidationError) as error:  # These values do not work; others may.
            texts = self._run.texts if self._run else texts
            told = {SCORE: 0.0, BUDGET: 0, RUNG: place + 1, TEXTS: texts, WHOLE: False, "ended_at": time.time()}
            return told | {FAILED: first_line(error), "done": True, "overhead_seconds": 0.0}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial keeps its own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: it finds its own."""


class _Run:
    """The model of a trial and how far its trunk is."""

    def __init__(self, job: TrialJob, values: Mapping[str, Any], folder: UPath, texts: int) -> None:
        """`texts` were trained on by now, branches included."""
        started = time.monotonic()
        settings = with_values(job.lesson.settings, values, _SECTION)
        own = job.lesson.encoder if isinstance(settings.encoder, str) else settings.encoder
        prepared = Prepared(job.lesson.prepared)
        self._lesson = replace(
            job.lesson, settings=settings, encoder=own, class_weights=class_weights_of(settings, prepared)
        )
        torch.set_num_threads(settings.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._checkpoints = Checkpoints(folder / TRUNK, print)
        last = self._checkpoints.last()
        precision = last.progress["precision"] if last else agreed(settings.precision, device)
        self._tokenizer = self._lesson.tokenizer()
        feed = feed_over(prepared.index.splits["train"], settings.lanes, settings.microbatch, settings.seed)
        steps = settings.epochs * feed.steps
        self._warm = round(steps * settings.warmup)
        self._rungs = ladder(steps, settings.warmup, settings.decay, job.rungs, job.reduction)
        if settings.compile:
            torch._dynamo.reset()  # There is a limit to how much is compiled, and it is one for all trials.
        self._trainer = trainer_of(
            self._lesson,
            self._tokenizer,
            feed,
            lambda optimizer: self._schedule(optimizer, self._rungs[0], 0),
            precision,
            device,
        )
        self._save_every = settings.checkpoint_seconds.max
        self._taken, self._tokens, self.texts = 0, 0, texts
        if last:
            self._checkpoints.load(last, self._state())
            self._taken, self._tokens = last.progress["taken"], last.progress["tokens"]
            self.texts = max(texts, last.progress["texts"])
            self._trainer.scale = LossScale(**last.progress["scale"])
        self.overhead = time.monotonic() - started

    def climb(self, place: int) -> dict[str, Any]:
        """To a rung, and on the branch to its end."""
        rung, last = self._rungs[place], place == len(self._rungs) - 1
        self._take(rung, rung.fork, keep=True)
        forked, scale, texts = (self._taken, self._tokens), replace(self._trainer.scale), self.texts
        kept: dict[str, Tensor] = {}
        if not last:
            self._save()
            kept = {name: value.to("cpu", copy=True) for name, value in self._state().items()}
        self._take(rung, rung.end, keep=last)  # The last branch is not left again.
        budget = self._tokens
        measured = self._lesson.validate(self._trainer, self._tokenizer, lambda: False)
        assert measured is not None
        set_training(self._trainer.model)
        if not last:
            with torch.no_grad():
                for name, value in self._state().items():
                    value.copy_(kept[name])
            (self._taken, self._tokens), self._trainer.scale = forked, scale
        self._checkpoints.wait()
        return {
            SCORE: self._lesson.score(measured),
            BUDGET: budget,
            RUNG: place + 1,
            TEXTS: self.texts,
            "branch_texts": self.texts - texts,
            "overhead_seconds": round(self.overhead, 2),
            "ended_at": time.time(),
            "metrics": {name: float(value) for name, value in measured.items()},
            "done": last,
            WHOLE: last,
        }

    def _take(self, rung: Rung, until: int, *, keep: bool) -> None:
        """Steps of the trunk, or from its fork on of the rung's branch; `keep`: with checkpoints now and then."""
        self._trainer.schedule = self._schedule(self._trainer.optimizer, rung, self._taken)
        saved = time.monotonic()
        while self._taken < until:
            result = self._trainer.step(*divmod(self._taken, self._trainer.feed.steps))
            self._taken += 1
            self._tokens += result.tokens
            self.texts += result.texts
            if keep and time.monotonic() - saved > self._save_every and not self._checkpoints.busy:
                self._save()
                saved = time.monotonic()

    def _save(self) -> None:
        progress = {
            "taken": self._taken,
            "tokens": self._tokens,
            "texts": self.texts,
            "precision": self._trainer.precision,
            "scale": vars(self._trainer.scale),
        }
        self._checkpoints.save(self._taken, self._state(), progress, {"none": torch.zeros(1)})

    def _schedule(self, optimizer: AdamW, rung: Rung, taken: int) -> LambdaLR:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        way = partial(wsd_rate, warm=self._warm, fork=rung.fork, end=rung.end)
        return LambdaLR(optimizer, way, last_epoch=taken - 1)

    def _state(self) -> dict[str, Tensor]:
        return training_state(self._trainer.model, self._trainer.optimizer)


def records(job: TrialJob) -> list[dict[str, Any]]:
    """What trials have found so far, `values` and `rungs`, in the order in which they were begun."""
    folder = job.work / "trials"
    if not folder.exists():
        return []
    folder.fs.invalidate_cache()
    paths = [entry / RECORD for entry in folder.iterdir() if (entry / RECORD).exists()]
    found: list[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(found, key=lambda each: each["began"])
