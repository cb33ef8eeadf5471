"""Steps with validation, early stopping and checkpoints: what every training run does around its steps.

Knows nothing of Ray: a `Channel` carries news and orders between the run and whoever watches it.
"""

import time
from collections.abc import Callable, Sequence
from enum import IntFlag
from typing import Any, Protocol

import torch

from models.checkpoints import training_state
from models.encoders import set_training
from models.ledger import Ledger
from models.precision import LossScale
from models.training import LaneTrainer
from pipelines.training.checkpoints import Checkpoints, Last
from pipelines.training.pace import Pace
from pipelines.training.spikes import Spikes
from pipelines.training.state import FitState, LeftError
from pipelines.training.trackers import Tracker

_NEWS_SECONDS = 0.5


class _Flag(IntFlag):
    """What the first worker tells all others with a step."""

    CHECKPOINT = 1
    LEAVE = 2


class Channel(Protocol):
    """Carries news and orders between the first worker and whoever watches the run."""

    def began(self, steps: int) -> Pace:
        """Tells, from every worker, that training goes on after `steps`; gives the pace of its checkpoints."""
        ...

    def ordered_to_leave(self) -> bool:
        """Whether the first worker has heard that the workers should take a checkpoint and leave."""
        ...

    def news(self, values: dict[str, Any]) -> None:
        """Tells, from the first worker, how far the run is."""
        ...

    def tell(self, sentence: str) -> None:
        """Tells the user, from the first worker, something that he must know."""
        ...


def restored(trainer: LaneTrainer, checkpoints: Checkpoints, last: Last | None) -> FitState:
    """Brings the trainer to a checkpoint's state; the beginning where there is none."""
    if last is None:
        return FitState(ledger=Ledger(trainer.feed.lanes))
    history = checkpoints.load(last, training_state(trainer.model, trainer.optimizer))
    trainer.scale = LossScale(**last.progress["loss_scale"])
    trainer.schedule.load_state_dict(last.progress["schedule"])
    # The groups' rates are the schedule's to set; it does so at its next step only.
    for group, rate in zip(trainer.optimizer.param_groups, trainer.schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    ledger = Ledger(trainer.feed.lanes, history["ledger"].numpy())
    return FitState(**last.progress["fit"], losses=history["losses"].tolist(), ledger=ledger)


def fit(
    trainer: LaneTrainer,
    state: FitState,
    checkpoints: Checkpoints,
    channel: Channel,
    *,
    steps: int,
    validate_every: int,
    validate: Callable[[Callable[[], bool]], dict[str, float] | None],
    score: Callable[[dict[str, float]], float],
    patience: int | None,
    keep_best: Callable[[int, int], None],
    trackers: Sequence[Tracker] = (),
    spikes: Spikes | None = None,
) -> FitState:
    """Trains from `state` until `steps` are taken, or until `patience` validations brought nothing better.

    `validate` measures after every so many steps and after the last, on all workers, unless what it asks on the way
    stops it; `keep_best` saves the weights that a validation found, each time its `score` is higher than ever before,
    and is told the validation's number and that of the best one before. Checkpoints come at the channel's pace, by the
    first worker's clock; one that is due with a validation comes after it, and remembers it. `spikes`: tells of them.

    Raises:
        LeftError: the channel ordered it; a checkpoint was taken.
    """
    feed = trainer.feed
    pace = channel.began(state.taken)
    last_checkpoint = last_news = time.monotonic()
    leaves_at = float("-inf")
    due = False

    def checkpoint() -> float:
        """Takes one; gives the time at which training goes on."""
        started = time.monotonic()
        for tracker in trackers:
            tracker.flush()
        _save(trainer, state, checkpoints)
        ended = time.monotonic()
        state.seconds += ended - started
        return ended

    def ordered_to_leave() -> bool:
        return channel.ordered_to_leave() and time.monotonic() >= leaves_at

    def leave() -> float:
        """Takes a checkpoint and ends; where that fails, gives the time until which the workers stay."""
        ended = checkpoint()
        if checkpoints.wait():
            channel.news(_news(state, steps))
            raise LeftError
        return ended + pace.least

    def planned(taken: int) -> int:
        """Validations after so many steps."""
        return taken // validate_every + (taken == steps and taken % validate_every > 0)

    while len(state.validations) < planned(steps) and not state.stopped_early:
        while len(state.validations) == planned(state.taken):
            started = time.monotonic()
            pace.cost = checkpoints.seconds
            flag = _Flag(0)
            if started - last_checkpoint > pace.interval and not checkpoints.busy:
                flag |= _Flag.CHECKPOINT
            if ordered_to_leave():
                flag |= _Flag.LEAVE
            epoch, step = divmod(state.taken, feed.steps)
            result = trainer.step(epoch, step, flag=flag)
            state.taken += 1
            state.ledger.append(result.digests)
            for left_out in result.skipped:
                place = {"epoch": epoch, "step": step, **vars(left_out)}
                state.skipped.append(place)
                channel.tell("epoch {epoch}, step {step}, lane {lane} is skipped: {reason}".format(**place))
            if not result.texts:
                continue
            state.losses.append(result.loss)
            if spikes and (usual := spikes.above(result.loss)) and trainer.rank == 0:
                channel.tell(_spike(trainer, epoch, step, result.loss, usual))
            state.texts += result.texts
            state.tokens += result.tokens
            state.padded += result.padded
            values = {"train/loss": result.loss, "train/learning_rate": float(trainer.schedule.get_last_lr()[0])}
            for tracker in trackers:
                tracker.log(len(state.losses), values)
            now = time.monotonic()
            if now - last_news > _NEWS_SECONDS:
                last_news = now
                channel.news(_news(state, steps) | {"checkpoint_age": now - last_checkpoint})
            state.seconds += now - started
            state.worker_seconds += (now - started) * trainer.workers
            if result.flag & _Flag.LEAVE:
                leaves_at = leave()
            due = due or bool(result.flag & _Flag.CHECKPOINT)
            if due and len(state.validations) == planned(state.taken):
                last_checkpoint, due = checkpoint(), False
        while (measured := validate(ordered_to_leave)) is None:
            leaves_at = leave()
        set_training(trainer.model)
        for tracker in trackers:
            tracker.log(len(state.losses), {f"validation/{name}": value for name, value in measured.items()})
        state.validations.append(measured)
        state.validated_at.append(state.taken)
        this = len(state.validations) - 1
        if (found := score(measured)) > state.best:
            keep_best(this, state.best_validation)
            state.best, state.best_validation = found, this
        elif patience is not None and this - state.best_validation >= patience:
            state.stopped_early = True
        if due:
            last_checkpoint, due = checkpoint(), False
    checkpoints.wait()
    channel.news(_news(state, steps))
    return state


def _save(trainer: LaneTrainer, state: FitState, checkpoints: Checkpoints) -> None:
    grown = {"losses", "ledger"}
    progress = {name: value for name, value in vars(state).items() if name not in grown}
    checkpoints.save(
        len(state.ledger.entries),
        training_state(trainer.model, trainer.optimizer),
        {"fit": progress, "schedule": trainer.schedule.state_dict(), "loss_scale": vars(trainer.scale)},
        {
            "losses": torch.tensor(state.losses, dtype=torch.float64),
            "ledger": torch.from_numpy(state.ledger.entries.copy()),
        },
    )


def _news(state: FitState, steps: int) -> dict[str, Any]:
    return {
        "steps": state.taken,
        "total": steps,
        "loss": state.losses[-1] if state.losses else 0.0,
        "texts_per_second": state.texts_per_second,
        "tokens_per_second": state.tokens_per_second,
        "padding_share": state.padding_share,
        "validation": state.validations[-1] if state.validations else {},
    }


def _spike(trainer: LaneTrainer, epoch: int, step: int, loss: float, usual: float) -> str:
    lanes = (trainer.rows(epoch, step, lane) for lane in range(trainer.feed.lanes))
    rows = ", ".join(str(row) for lane in lanes for row in lane)
    return f"loss spike at epoch {epoch}, step {step}: {loss:.3f}, where {usual:.3f} is usual (rows {rows})"
