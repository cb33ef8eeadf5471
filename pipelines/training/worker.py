"""One worker's part of a fine-tuning run, on whatever carries its checkpoints (Ray Train, or a test)."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from upath import UPath

from cluster.store import STORAGE_ERRORS, local_copy, upload_tree
from models import dropout
from models.checkpoints import trained
from models.classifier import ClassifierSpec, save
from models.encoders import build_classifier, set_padding
from models.faults import out_of_memory
from models.feed import Feed
from models.layers import checkpoint_activations, compile_layers
from models.objectives import ClassificationObjective
from models.optimizer import build_optimizer, build_schedule
from models.precision import Precision, agreed
from models.settings import InputError, first_line
from models.sharding import gathered, shard
from models.training import LaneTrainer
from pipelines.metrics import metric_of
from pipelines.prepared import Prepared
from pipelines.pretrained import encoder_folder
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.fitting import Channel, FitState, fit, restored
from pipelines.training.lanes import LaneReader, read_feed_chunk
from pipelines.training.trackers import tracking
from pipelines.training.validating import validation_metrics

if TYPE_CHECKING:
    from pipelines.finetune import FinetuneSettings

_BEST = "best"


@dataclass(frozen=True)
class WorkerJob:
    """All that a worker must know; the same for each."""

    settings: "FinetuneSettings"
    prepared: UPath
    out: UPath
    work: UPath
    feed: Feed
    spec: ClassifierSpec
    class_weights: dict[str, list[float]]
    recipe: str
    fingerprint: str


@contextlib.contextmanager
def _telling_full_memory() -> Iterator[None]:
    """Where memory does not suffice outside of a microbatch: for the optimizer's state, say, or in validation."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(
            "memory does not suffice for training: lower finetune.microbatch or prepare.max_length, set "
            "finetune.activation_checkpointing, or spread the model over more workers with finetune.fsdp "
            f"({first_line(error)})."
        ) from error


@_telling_full_memory()
def train_lanes(
    job: WorkerJob, checkpoints: Checkpoints, channel: Channel, rank: int, workers: int, device: torch.device
) -> FitState:
    """One worker's part of the run: owns the lanes rank, rank + workers, ... and ends with the model written."""
    settings, prepared = job.settings, Prepared(job.prepared)
    last = checkpoints.last()
    precision = last.progress["fit"]["precision"] if last else agreed(settings.precision, device)
    model = _build(job)
    with local_copy(prepared.tokenizer_folder) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    pad = set_padding(model, tokenizer)
    lay_out(model, settings, precision, workers, device)
    reader = LaneReader(
        job.feed,
        lambda number: read_feed_chunk(prepared, job.feed, number),
        range(rank, job.feed.lanes, workers),
        pad,
    )
    optimizer = build_optimizer(model, settings.learning_rate, settings.weight_decay)
    steps = settings.epochs * job.feed.steps
    trainer = LaneTrainer(
        model,
        ClassificationObjective(job.spec.labels, job.class_weights, settings.label_smoothing),
        job.feed,
        reader.batch,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, settings.schedule, steps, settings.warmup),
        precision=precision,
        clip=settings.clip,
        exact=settings.exact,
        skip_bad=settings.bad_microbatch == "skip",
        rank=rank,
        workers=workers,
    )
    if settings.compile:
        trainer.warm_up()
    state = restored(trainer, checkpoints, last)
    state.precision = precision

    def validate(stopped: Callable[[], bool]) -> dict[str, float] | None:
        measured = validation_metrics(prepared, trainer, job.spec.labels, pad, stopped)
        return measured and {settings.metric: metric_of(measured, settings.metric, job.spec.labels), **measured}

    names = settings.trackers if rank == 0 else ()
    with tracking(
        names, job.out, len(state.losses), job.recipe, job.fingerprint, settings.model_dump(mode="json")
    ) as trackers:
        state = fit(
            trainer,
            state,
            checkpoints,
            channel,
            epochs=settings.epochs,
            validate=validate,
            metric=settings.metric,
            patience=settings.patience,
            keep_best=lambda epoch, before: _keep_best(job, model, checkpoints, rank, epoch, before),
            trackers=trackers,
        )
    if rank == 0:
        whole = _build(job) if trainer.sharded else model
        set_padding(whole, tokenizer)
        weights = trained(whole)
        with local_copy(job.work / _BEST) as folder, torch.no_grad():
            for name, value in load_file(folder / _weights_of(state.best_epoch)).items():
                weights[name].copy_(value)
        with tempfile.TemporaryDirectory(prefix="shoal-model-") as temporary:
            save(whole, tokenizer, job.spec, Path(temporary))
            upload_tree(Path(temporary), job.out / "model")
    if workers > 1:
        dist.barrier()
    return state


def _build(job: WorkerJob) -> PreTrainedModel:
    settings = job.settings
    common: dict[str, Any] = {
        "labels": job.spec.labels,
        "seed": settings.seed,
        "dropout": settings.dropout,
        "head_only": settings.tune == "head",
    }
    if isinstance(settings.encoder, str):
        with encoder_folder(settings.encoder) as folder:
            return build_classifier(pretrained=folder, **common)
    with local_copy(Prepared(job.prepared).tokenizer_folder) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = settings.encoder
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": encoder.hidden_size,
        "num_hidden_layers": encoder.layers,
        "num_attention_heads": encoder.heads,
        "max_position_embeddings": job.spec.max_length,
        "pad_token_id": tokenizer.pad_token_id,
    }
    common["dropout"] = encoder.dropout if settings.dropout is None else settings.dropout
    return build_classifier(architecture=encoder.architecture, shape=shape, **common)


def lay_out(
    model: PreTrainedModel, settings: "FinetuneSettings", precision: Precision, workers: int, device: torch.device
) -> None:
    """Puts a model onto the device, its layers changed as the settings say."""
    if device.type == "cpu" and not settings.compile:
        dropout.use_stream(model)
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    if settings.compile:
        compile_layers(model)
    if settings.fsdp and workers > 1:
        shard(model, device, precision, workers)
    else:
        nn.Module.to(model, device)


def _keep_best(
    job: WorkerJob, model: PreTrainedModel, checkpoints: Checkpoints, rank: int, epoch: int, before: int
) -> None:
    """Saves the weights after an epoch, which validated best so far.

    Those of the epoch that was the best before, and of those that were when the checkpoints were taken, are kept:
    sums being floats, a run that goes on from there may not find the new ones better.
    """
    weights = gathered(trained(model), rank)
    if rank:
        return
    with tempfile.TemporaryDirectory(prefix="shoal-best-") as folder:
        save_file(weights, Path(folder) / _weights_of(epoch))
        upload_tree(Path(folder), job.work / _BEST)
    with contextlib.suppress(*STORAGE_ERRORS, ValueError):  # They only take room.
        needed = (each["fit"]["best_epoch"] for each in checkpoints.progresses())
        kept = {_weights_of(each) for each in (epoch, before, *needed)}
        for file in (job.work / _BEST).iterdir():
            if file.name not in kept:
                file.unlink()


def _weights_of(epoch: int) -> str:
    return f"{epoch}.safetensors"
