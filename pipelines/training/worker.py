"""One worker's part of a training run, on whatever carries its checkpoints (Ray Train, or a test)."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from upath import UPath

from cluster.store import STORAGE_ERRORS, local_copy, upload_tree
from models import dropout
from models.checkpoints import trained
from models.faults import out_of_memory
from models.feed import Feed
from models.layers import checkpoint_activations, compile_layers
from models.optimizer import build_optimizer, build_schedule
from models.precision import agreed
from models.settings import InputError, Precision, first_line
from models.sharding import gathered, shard
from models.training import LaneTrainer
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.fitting import Channel, fit, restored
from pipelines.training.lesson import Lesson
from pipelines.training.settings import TrainingSettings
from pipelines.training.spikes import Spikes
from pipelines.training.state import FitState
from pipelines.training.trackers import tracking

_BEST = "best"


@dataclass(frozen=True)
class WorkerJob:
    """All that a worker must know; the same for each."""

    lesson: Lesson
    out: UPath
    work: UPath
    feed: Feed
    steps: int
    """Of the whole run."""
    validate_every: int
    """Steps."""
    patience: int | None
    recipe: str
    fingerprint: str
    unit: Literal["texts", "tokens"] = "texts"
    """What its speed is told in."""
    tell_spikes: bool = False

    @property
    def settings(self) -> TrainingSettings:
        """How it learns."""
        settings: TrainingSettings = self.lesson.settings
        return settings


@contextlib.contextmanager
def telling_full_memory(lesson: Lesson) -> Iterator[None]:
    """Where memory does not suffice outside of a microbatch: for the optimizer's state, say, or in validation."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        section = lesson.section
        raise InputError(
            f"memory does not suffice for training: lower {section}.microbatch or {lesson.length}, set "
            f"{section}.activation_checkpointing, or spread the model over more workers with {section}.fsdp "
            f"({first_line(error)})."
        ) from error


def train_lanes(
    job: WorkerJob, checkpoints: Checkpoints, channel: Channel, rank: int, workers: int, device: torch.device
) -> FitState:
    """One worker's part of the run: owns the lanes rank, rank + workers, ... and ends with the model written."""
    with telling_full_memory(job.lesson):
        return _train_lanes(job, checkpoints, channel, rank, workers, device)


def _train_lanes(
    job: WorkerJob, checkpoints: Checkpoints, channel: Channel, rank: int, workers: int, device: torch.device
) -> FitState:
    lesson, settings = job.lesson, job.settings
    last = checkpoints.last()
    precision = last.progress["fit"]["precision"] if last else agreed(settings.precision, device)
    tokenizer = lesson.tokenizer()
    trainer = trainer_of(
        lesson,
        tokenizer,
        job.feed,
        lambda optimizer: build_schedule(optimizer, settings.schedule, job.steps, settings.warmup, settings.decay),
        precision,
        device,
        rank,
        workers,
    )
    model = trainer.model
    state = restored(trainer, checkpoints, last)
    state.precision, state.cost = precision, lesson.cost(trainer)
    names = settings.trackers if rank == 0 else ()
    described = settings.model_dump(mode="json")
    with tracking(
        names, job.out, len(state.losses), job.recipe, job.fingerprint, described, lesson.section
    ) as trackers:
        state = fit(
            trainer,
            state,
            checkpoints,
            channel,
            steps=job.steps,
            validate_every=job.validate_every,
            validate=lambda stopped: lesson.validate(trainer, tokenizer, stopped),
            score=lesson.score,
            patience=job.patience,
            keep_best=lambda this, before: _keep_best(job, model, checkpoints, rank, this, before),
            trackers=trackers,
            spikes=Spikes() if job.tell_spikes else None,
        )
    if rank == 0:
        whole = lesson.build(tokenizer, device, precision) if trainer.sharded else model
        weights = trained(whole)
        with local_copy(job.work / _BEST) as folder, torch.no_grad():
            for name, value in load_file(folder / _weights_of(state.best_validation)).items():
                weights[name].copy_(value)
        with tempfile.TemporaryDirectory(prefix="shoal-model-") as temporary:
            lesson.save(whole, tokenizer, Path(temporary))
            upload_tree(Path(temporary), job.out / "model")
    if workers > 1:
        dist.barrier()
    return state


def trainer_of(
    lesson: Lesson,
    tokenizer: PreTrainedTokenizerBase,
    feed: Feed,
    schedule: Callable[[AdamW], LRScheduler],
    precision: Precision,
    device: torch.device,
    rank: int = 0,
    workers: int = 1,
) -> LaneTrainer:
    """What takes a lesson's steps on one worker, at their beginning; `schedule` is made for its optimizer."""
    settings: TrainingSettings = lesson.settings
    model = lesson.build(tokenizer, device, precision)
    lay_out(model, settings, precision, workers, device, lesson.section)
    optimizer = build_optimizer(model, settings.learning_rate, settings.weight_decay)
    trainer = LaneTrainer(
        model,
        lesson.loss(),
        feed,
        lesson.batches(feed, range(rank, feed.lanes, workers), tokenizer),
        optimizer=optimizer,
        schedule=schedule(optimizer),
        precision=precision,
        clip=settings.clip,
        exact=settings.exact,
        skip_bad=settings.bad_microbatch == "skip",
        rank=rank,
        workers=workers,
        section=lesson.section,
        length=lesson.length,
    )
    if settings.compile:
        trainer.warm_up()
    return trainer


def lay_out(
    model: PreTrainedModel,
    settings: TrainingSettings,
    precision: Precision,
    workers: int,
    device: torch.device,
    section: str = "finetune",
) -> None:
    """Puts a model onto the device, its layers changed as the settings of the recipe's section say."""
    if device.type == "cpu" and not settings.compile:
        dropout.use_stream(model)
    if settings.activation_checkpointing:
        checkpoint_activations(model, section)
    if settings.compile:
        compile_layers(model, section)
    if settings.fsdp and workers > 1:
        shard(model, device, precision, workers)
    else:
        nn.Module.to(model, device)


def _keep_best(
    job: WorkerJob, model: PreTrainedModel, checkpoints: Checkpoints, rank: int, this: int, before: int
) -> None:
    """Saves the weights that a validation found to be the best so far.

    Those that were the best before, and those that were when the checkpoints were taken, are kept: sums being floats, a
    run that goes on from there may not find the new ones better.
    """
    weights = gathered(trained(model), rank)
    if rank:
        return
    with tempfile.TemporaryDirectory(prefix="shoal-best-") as folder:
        save_file(weights, Path(folder) / _weights_of(this))
        upload_tree(Path(folder), job.work / _BEST)
    with contextlib.suppress(*STORAGE_ERRORS, ValueError):  # They only take room.
        needed = (each["fit"]["best_validation"] for each in checkpoints.progresses())
        kept = {_weights_of(each) for each in (this, before, *needed)}
        for file in (job.work / _BEST).iterdir():
            if file.name not in kept:
                file.unlink()


def _weights_of(validation: int) -> str:
    return f"{validation}.safetensors"
