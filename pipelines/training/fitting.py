"""Epochs of steps, with validation, early stopping and checkpoints: what every training run does around its steps.

Knows nothing of Ray: a `Reporter` carries checkpoints and news to wherever the run lives.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from models.checkpoints import load_state, save_state
from models.encoders import set_training
from models.precision import Precision
from models.training import LaneTrainer
from pipelines.training.trackers import Tracker

_NEWS_SECONDS = 0.5


@dataclass
class FitState:
    """How far a run is: the cursor (epoch, step) of the next step, and what has been seen so far."""

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    """Of each step since the beginning; steps without texts have none."""
    validations: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    best: float = float("-inf")
    stopped_early: bool = False
    texts: int = 0
    seconds: float = 0.0
    """Of training steps and their checkpoints, over all restarts; what a killed worker took along is not counted."""
    tokens: int = 0
    padded: int = 0
    precision: Precision | None = None
    """What is computed in: decided once, when the run begins, and kept through all restarts."""

    @property
    def texts_per_second(self) -> float:
        """Training throughput."""
        return self.texts / self.seconds if self.seconds else 0.0

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that was padding."""
        return 1 - self.tokens / self.padded if self.padded else 0.0


class Reporter(Protocol):
    """Where a run's checkpoints and news go. Every worker calls `checkpoint` and `restore` equally often."""

    def restore(self) -> AbstractContextManager[Path | None]:
        """The folder of the last checkpoint, or None at the beginning."""
        ...

    def checkpoint(self, write: Callable[[Path], None], metrics: dict[str, float]) -> None:
        """Has the first worker write a checkpoint and makes it the last one once it is whole."""
        ...

    def news(self, values: dict[str, Any]) -> None:
        """Tells, from the first worker, how far the run is."""
        ...


def restored(trainer: LaneTrainer, reporter: Reporter) -> FitState:
    """Brings the trainer to the last checkpoint's state; the beginning where there is none."""
    with reporter.restore() as folder:
        if folder is None:
            return FitState()
        return FitState(**load_state(folder, trainer.model, trainer.optimizer, trainer.schedule))


def fit(
    trainer: LaneTrainer,
    state: FitState,
    reporter: Reporter,
    *,
    epochs: int,
    validate: Callable[[], dict[str, float]],
    metric: str,
    patience: int | None,
    checkpoint_seconds: float,
    keep_best: Callable[[], None],
    trackers: Sequence[Tracker] = (),
) -> FitState:
    """Trains from `state` to the end of the last epoch, or until `patience` validations brought nothing better.

    `validate` measures after each epoch, on all workers; `keep_best` saves the weights, each time `metric` is better
    than ever before. Checkpoints come at most every `checkpoint_seconds`, by the first worker's clock; one that is due
    at the end of an epoch comes after its validation, which it then remembers.
    """
    feed = trainer.feed
    last_checkpoint = last_news = time.monotonic()
    due = False
    while state.epoch < epochs and not state.stopped_early:
        while state.step < feed.steps:
            started = time.monotonic()
            result = trainer.step(state.epoch, state.step, flag=started - last_checkpoint > checkpoint_seconds)
            state.step += 1
            if result is None:
                continue
            state.losses.append(result.loss)
            state.texts += result.texts
            state.tokens += result.tokens
            state.padded += result.padded
            values = {"train/loss": result.loss, "train/learning_rate": float(trainer.schedule.get_last_lr()[0])}
            for tracker in trackers:
                tracker.log(len(state.losses), values)
            if time.monotonic() - last_news > _NEWS_SECONDS:
                last_news = time.monotonic()
                reporter.news(_news(state, feed.steps, epochs))
            state.seconds += time.monotonic() - started
            due = due or result.flag
            if due and state.step < feed.steps:
                last_checkpoint, due = _checkpoint(trainer, state, reporter), False
        measured = validate()
        set_training(trainer.model)
        for tracker in trackers:
            tracker.log(len(state.losses), {f"validation/{name}": value for name, value in measured.items()})
        state.validations.append(measured)
        if measured[metric] > state.best:
            state.best, state.best_epoch = measured[metric], state.epoch
            keep_best()
        elif patience is not None and state.epoch - state.best_epoch >= patience:
            state.stopped_early = True
        state.epoch, state.step = state.epoch + 1, 0
        if due:
            last_checkpoint, due = _checkpoint(trainer, state, reporter), False
    reporter.news(_news(state, feed.steps, epochs))
    return state


def _checkpoint(trainer: LaneTrainer, state: FitState, reporter: Reporter) -> float:
    """Writes a checkpoint; gives the time at which training goes on."""
    started = time.monotonic()
    progress = asdict(state)
    reporter.checkpoint(
        lambda folder: save_state(folder, trainer.model, trainer.optimizer, trainer.schedule, progress),
        {"epoch": state.epoch, "step": state.step, "loss": state.losses[-1]},
    )
    ended = time.monotonic()
    state.seconds += ended - started
    return ended


def _news(state: FitState, epoch_steps: int, epochs: int) -> dict[str, Any]:
    return {
        "steps": state.epoch * epoch_steps + state.step,
        "total": epochs * epoch_steps,
        "loss": state.losses[-1] if state.losses else 0.0,
        "texts_per_second": state.texts_per_second,
        "padding_share": state.padding_share,
        "validation": state.validations[-1] if state.validations else {},
    }
