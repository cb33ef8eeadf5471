"""A trial: one set of values, trained on the lanes that fine-tuning has, and scored at its rungs (Ray Tune).

This Trainable takes a trial from where it is to its next rung: the trunk to its fork, whose state is kept, and a branch
that decays and is scored. What was scored and the trunk's state stand in the sweep's working folder under the values'
own name, so that whoever is next told to go on with them can, on any node and in any command. An actor goes from trial
to trial and keeps what it has imported, and the model where it goes on with the same one.
"""

import gc
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
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
from models.faults import out_of_memory
from models.optimizer import wsd_rate
from models.precision import LossScale, agreed
from models.settings import InputError, first_line
from pipelines.finetune import class_weights_of
from pipelines.prepared import Prepared
from pipelines.sweeping.board import BUDGET, FAILED, LOSS, RUNG, SCORE, TEXTS, WHOLE, failure
from pipelines.sweeping.ladder import Rung, ladder
from pipelines.sweeping.space import with_values
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.classifying import Classifying
from pipelines.training.lanes import feed_over
from pipelines.training.worker import telling_full_memory, trainer_of

RECORD, TRUNK, _SECTION = "trial.json", "trunk", "finetune"
VALUES, BEGAN, RUNGS, PLACE = "values", "began", "rungs", "place"


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

    _values: Mapping[str, Any] = {}
    _run: "_Run | None" = None

    def setup(self, config: dict[str, Any], job: TrialJob | None = None) -> None:
        """Begins a trial, or goes on with it: its `values`, and the `place`, from 0, of the rung to climb to."""
        before = self._values
        if job is not None:
            self._job, self._run = job, None
        self._values, self._place = config[VALUES], config[PLACE]
        self._folder = self._job.folder(self._values)
        if self._values != before:
            self._run = None
            gc.collect()  # A model and what trains it hold each other.

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial, in the same process."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Takes the trial to the rung; what it was found to be worth there."""
        with claimed(self._folder, print):  # A process on a node that was taken for lost may still be at it.
            record = record_of(self._folder) or {VALUES: self._values, BEGAN: time.time(), RUNGS: []}
            told = record[RUNGS]
            while len(told) <= self._place and not (told and FAILED in told[-1]):
                began = time.time()
                found = self._climb(len(told), told[-1] if told else None)
                told.append(found | {"began_at": began, "ended_at": time.time()})
                write_record(self._folder, record)
        # The record's text, for who asked for it need not reach the store again.
        return {SCORE: told[-1][SCORE], RUNGS: json.dumps(told), "done": True}

    def _climb(self, place: int, last: Mapping[str, Any] | None) -> dict[str, Any]:
        texts = last[TEXTS] if last else 0
        try:
            with telling_full_memory(self._job.lesson):
                if self._run is None or self._run.place != place:
                    self._run = None
                    gc.collect()  # There need not be room for two.
                    self._run = _Run(self._job, self._values, self._folder, place, texts)
                return self._run.climb()
        except (InputError, ValidationError) as error:  # These values do not work; others may.
            if error.__cause__ and out_of_memory(error.__cause__):
                raise  # A new process, or another node, may have room.
            texts, self._run = self._run.texts if self._run else texts, None
            return failure(first_line(error), last) | {TEXTS: texts, "overhead_seconds": 0.0}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial keeps its own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: it finds its own."""


class _Run:
    """The model of a trial and how far its trunk is."""

    def __init__(self, job: TrialJob, values: Mapping[str, Any], folder: UPath, place: int, texts: int) -> None:
        """To climb to the rung at `place`, from 0; `texts` were trained on by now, branches included."""
        started, self.place = time.monotonic(), place
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

    def climb(self) -> dict[str, Any]:
        """To the fork, and on the branch to the rung; the next one is the one after it."""
        rung, last = self._rungs[self.place], self.place == len(self._rungs) - 1
        self.place += 1
        overhead, self.overhead = self.overhead, 0.0
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
            LOSS: fmean(float(value) for name, value in measured.items() if name.endswith("log_loss")),
            BUDGET: budget,
            RUNG: rung.number,
            TEXTS: self.texts,
            "branch_texts": self.texts - texts,
            "overhead_seconds": round(overhead, 2),
            "metrics": {name: float(value) for name, value in measured.items()},
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


def record_of(folder: UPath) -> dict[str, Any] | None:
    """A trial's `values`, when it `began`, and what it was found to be worth at its `rungs` so far."""
    path = folder / RECORD
    path.fs.invalidate_cache()
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def write_record(folder: UPath, record: Mapping[str, Any]) -> None:
    """Writes it, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORD, json.dumps(record))


def records(job: TrialJob) -> list[dict[str, Any]]:
    """The records of all trials that were begun, in that order."""
    folder = job.work / "trials"
    folder.fs.invalidate_cache()
    if not folder.exists():
        return []
    found = [record for entry in folder.iterdir() if (record := record_of(entry))]
    return sorted(found, key=lambda each: float(each[BEGAN]))
