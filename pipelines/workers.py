"""Training workers on Ray: starts them, carries their checkpoints, tells how far they are, and starts them again."""

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.api.report_config import CheckpointUploadMode
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from upath import UPath

from cluster.store import ClusterError, is_local, local_copy, upload_tree
from models.checkpoints import trained
from models.classifier import ClassifierSpec, save
from models.encoders import build_classifier
from models.feed import Feed
from models.objectives import ClassificationObjective
from models.settings import InputError
from models.training import LaneTrainer, autocast, build_optimizer, build_schedule
from pipelines.fitting import FitState, fit, restored
from pipelines.lanes import Chunk, LaneReader, read_chunk
from pipelines.metrics import classification_metrics, metric_of
from pipelines.prepared import Prepared
from pipelines.pretrained import encoder_folder
from pipelines.progress import Progress
from pipelines.trackers import tracking

if TYPE_CHECKING:
    from pipelines.finetune import FinetuneSettings

_BEST = "best.safetensors"
_VALIDATION_TEXTS = 32


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


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: FitState
    workers: int


class Bulletin:
    """Holds the latest news of a run between its workers and the command that shows them."""

    def __init__(self) -> None:
        self._news: dict[str, Any] = {}

    def post(self, values: dict[str, Any]) -> None:
        """Adds to the news."""
        self._news.update(values)

    def read(self) -> dict[str, Any]:
        """All news so far."""
        return self._news


class RayReporter:
    """Carries checkpoints through Ray Train and news to the bulletin (`pipelines.fitting.Reporter`)."""

    def __init__(self, bulletin: Any, rank: int) -> None:
        self._bulletin, self._rank = bulletin, rank

    @contextlib.contextmanager
    def restore(self) -> Iterator[Path | None]:
        """The last whole checkpoint, copied here where it is remote."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def checkpoint(self, write: Callable[[Path], None], metrics: dict[str, float]) -> None:
        """Writes to this machine's disk now; the copy to the store goes on while training does."""
        if self._rank:
            ray.train.report(metrics)
            return
        folder = Path(tempfile.mkdtemp(prefix="shoal-checkpoint-"))
        write(folder)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        )

    def news(self, values: dict[str, Any]) -> None:
        """Posts without waiting for an answer."""
        if self._rank == 0:
            self._bulletin.post.remote(values)


def train(job: WorkerJob, progress: Progress) -> Outcome:
    """Runs the job's workers to the end, from the last checkpoint where there is one."""
    settings = job.settings
    wanted: int | tuple[int, int] = settings.workers
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    room = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 0) / (1 if gpus else settings.threads))
    if room < settings.workers:
        wanted = (1, settings.workers)
        progress.console.print(
            f"  there is room for {room} of {settings.workers} workers now; training starts with those "
            "and ends in the same weights"
        )
    bulletin: Any = ray.remote(num_cpus=0)(Bulletin).remote()
    per_worker = {"CPU": settings.threads} | ({"GPU": 1} if gpus else {})
    # Typed as the first generation of Ray Train, which it is not.
    torch_trainer: Any = TorchTrainer
    trainer = torch_trainer(
        _train_worker,
        train_loop_config={"job": job, "bulletin": bulletin},
        scaling_config=ScalingConfig(num_workers=wanted, use_gpu=gpus, resources_per_worker=per_worker),
        run_config=RunConfig(
            name="train",
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
            **_storage(job.work),
        ),
    )
    with _showing(bulletin, progress):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _explained(error) from error
    news = ray.get(bulletin.read.remote())
    if "mistake" in news:
        raise InputError(news["mistake"])
    return Outcome(FitState(**news["state"]), news["workers"])


def _storage(work: UPath) -> dict[str, Any]:
    if is_local(work):
        return {"storage_path": work.path}
    return {"storage_path": work.path, "storage_filesystem": PyFileSystem(FSSpecHandler(work.fs))}


def _explained(error: TrainingFailedError) -> Exception:
    """The user's own mistake where a worker met one, else what ended the run."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for failure in failures.values():
        if isinstance(failure, InputError | ClusterError):
            return type(failure)(str(failure))
        if isinstance(failure, OSError) and failure.errno:
            return ClusterError(f"a training worker failed: {failure}; run the same command again to go on.")
    reason = next((str(failure).strip().splitlines()[-1] for failure in failures.values()), str(error))
    return ClusterError(f"training ended early: {reason}; run the same command again to go on.")


@contextlib.contextmanager
def _showing(bulletin: Any, progress: Progress) -> Iterator[None]:
    """Shows the bulletin's news while the block runs."""
    done = threading.Event()
    with progress.step("training") as step:

        def show() -> None:
            while not done.wait(0.5):
                try:
                    news = ray.get(bulletin.read.remote(), timeout=5)
                except ray.exceptions.RayError:
                    continue
                if "steps" in news:
                    best = "".join(f", {name} {value:.3f}" for name, value in list(news["validation"].items())[:1])
                    note = f"loss {news['loss']:.3f}, {news['texts_per_second']:,.0f} texts/s{best}"
                    step.update(news["steps"], note, total=news["total"])

        thread = threading.Thread(target=show, daemon=True, name="news")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _train_worker(config: dict[str, Any]) -> None:
    """What each worker runs (from the start, after every restart)."""
    job: WorkerJob = config["job"]
    settings, context = job.settings, ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(settings.threads)
    reporter = RayReporter(config["bulletin"], rank)
    try:
        state = train_lanes(job, reporter, rank, workers, get_device())
    except InputError as error:
        # Every worker meets the same mistake, and starting again would not mend it.
        reporter.news({"mistake": str(error)})
        return
    if rank == 0:
        ray.get(config["bulletin"].post.remote({"state": asdict(state), "workers": workers}))


def train_lanes(job: WorkerJob, reporter: Any, rank: int, workers: int, device: torch.device) -> FitState:
    """One worker's part of the run: owns the lanes rank, rank + workers, ... and ends with the model written."""
    settings, prepared = job.settings, Prepared(job.prepared)
    model = _build(job)
    nn.Module.to(model, device)
    with local_copy(prepared.tokenizer_folder) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    reader = LaneReader(
        job.feed,
        lambda number: read_chunk(prepared, "train", number),
        range(rank, job.feed.lanes, workers),
        tokenizer.pad_token_id or 0,
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
        precision=settings.precision,
        clip=settings.clip,
        exact=settings.exact,
        rank=rank,
        workers=workers,
    )
    state = restored(trainer, reporter)
    names = settings.trackers if rank == 0 else ()
    with tracking(
        names, job.out, len(state.losses), job.recipe, job.fingerprint, settings.model_dump(mode="json")
    ) as trackers:
        state = fit(
            trainer,
            state,
            reporter,
            epochs=settings.epochs,
            validate=lambda: _validate(job, prepared, trainer, tokenizer.pad_token_id or 0),
            metric=settings.metric,
            patience=settings.patience,
            checkpoint_seconds=settings.checkpoint_seconds,
            keep_best=lambda: _keep_best(job, model, rank),
            trackers=trackers,
        )
    if rank == 0:
        with local_copy(job.work / "best") as folder, torch.no_grad():
            for name, value in load_file(folder / _BEST).items():
                trained(model)[name].copy_(value)
        with tempfile.TemporaryDirectory(prefix="shoal-model-") as temporary:
            save(model, tokenizer, job.spec, Path(temporary))
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


def _keep_best(job: WorkerJob, model: PreTrainedModel, rank: int) -> None:
    """Saves the weights that validated best so far."""
    if rank:
        return
    with tempfile.TemporaryDirectory(prefix="shoal-best-") as folder:
        save_file({name: p.detach().contiguous() for name, p in trained(model).items()}, Path(folder) / _BEST)
        upload_tree(Path(folder), job.work / "best")


def _validate(job: WorkerJob, prepared: Prepared, trainer: LaneTrainer, pad: int) -> dict[str, float]:
    """The validation metrics, the same bits on every worker and for every number of workers.

    Chunks are dealt to the workers; each fills in its rows of one array of logits, and the arrays are added up.
    """
    split = prepared.index.splits["validation"]
    count = -(-split.rows // split.chunk_rows)
    classes = sum(len(column.classes) for column in job.spec.labels)
    logits = torch.zeros(split.rows, classes, device=trainer.device)
    trainer.model.eval()
    labels: dict[str, list[np.ndarray[Any, Any]]] = {column.name: [] for column in job.spec.labels}
    for number in range(count):
        chunk = read_chunk(prepared, "validation", number)
        for name, values in chunk.labels.items():
            labels[name].append(values)
        if number % trainer.workers == trainer.rank:
            start = number * split.chunk_rows
            logits[start : start + len(chunk.rows)] = _score(chunk, trainer, classes, pad)
    if trainer.workers > 1:
        dist.all_reduce(logits)
    columns = {column.name: column for column in job.spec.labels}
    targets = {
        name: np.concatenate(parts).astype(bool if columns[name].multi else np.int64) for name, parts in labels.items()
    }
    measured = classification_metrics(logits.cpu().numpy(), targets, job.spec.labels)
    return {job.settings.metric: metric_of(measured, job.settings.metric, job.spec.labels), **measured}


def _score(chunk: Chunk, trainer: LaneTrainer, classes: int, pad: int) -> torch.Tensor:
    order = np.argsort(chunk.lengths, kind="stable")
    out = torch.zeros(len(order), classes, device=trainer.device)
    for start in range(0, len(order), _VALIDATION_TEXTS):
        items = order[start : start + _VALIDATION_TEXTS]
        batch = chunk.batch(items, pad)
        inputs = {name: value.to(trainer.device) for name, value in batch.inputs.items()}
        with torch.inference_mode(), autocast(trainer.device, trainer.precision):
            out[torch.from_numpy(items).to(trainer.device)] = trainer.model(**inputs).logits.float()
    return out
