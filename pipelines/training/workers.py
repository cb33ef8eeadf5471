"""Training workers on Ray: starts them, carries their checkpoints, tells how far they are, and starts them again."""

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.api.report_config import CheckpointUploadMode
from upath import UPath

from cluster.connect import room_for
from cluster.logs import causes
from cluster.memory import training_environment
from cluster.store import ClusterError, is_local
from models.settings import InputError
from pipelines.progress import Progress
from pipelines.training.bulletin import Bulletin
from pipelines.training.fitting import FitState
from pipelines.training.worker import WorkerJob, train_lanes

_SOON_SECONDS = 60.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: FitState
    workers: int


class MistakesEndTheRun(ray.train.UserCallback):
    """Ends all workers as soon as one meets a user's mistake: the others would wait for it, and no restart mends it.

    It is raised in Ray Train's controller, whose own errors are not retried.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises the mistake, if a worker met one."""
        for error in worker_exceptions.values():
            if isinstance(error, InputError):
                raise InputError(str(error))


class RayReporter:
    """Carries checkpoints through Ray Train and news to the bulletin (`pipelines.training.fitting.Reporter`)."""

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
    """Runs the job's workers to the end, from the last checkpoint where there is one.

    Raises:
        InputError: a worker met a mistake of the user's.
        ClusterError: workers were lost too often, or nothing more can be written.
    """
    settings = job.settings
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    room_for(settings.threads, int(gpus), "a training worker", "finetune.threads")
    wanted = _wanted(settings.workers, settings.threads, gpus, progress)
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
            callbacks=[MistakesEndTheRun()],
            worker_runtime_env={} if gpus else {"env_vars": training_environment()},
            **_storage(job.work),
        ),
    )
    with _showing(bulletin, progress):
        try:
            outcome: Outcome = trainer.fit().return_value
        except TrainingFailedError as error:
            raise _explained(error) from error
    return outcome


def _wanted(workers: int, threads: int, gpus: bool, progress: Progress) -> int | tuple[int, int]:
    """How many workers to ask Ray Train for: a number, or as many as there are, from one to the last."""
    room = sum(_room(node["Resources"], threads, gpus) for node in ray.nodes() if node["Alive"])
    if room < workers:
        progress.console.print(
            f"  there is room for {room or 'none'} of {workers} workers now; training starts with "
            f"{'those' if room else 'the first that finds room'} and ends in the same weights"
        )
        return 1, workers
    # Ray Train goes by what the cluster has, not by what is free, and would wait for the others to end.
    free = _free(threads, gpus, workers)
    if not free:
        progress.console.print("  others hold the whole cluster; training waits for room")
        return workers
    if free < workers:
        progress.console.print(
            f"  others leave room for {free} of {workers} workers; training runs on those and ends in the same weights"
        )
    return free


def _room(node: Mapping[str, float], threads: int, gpus: bool) -> int:
    """How many workers a node has the resources for."""
    by_cpus = node.get("CPU", 0) // threads
    return int(min(by_cpus, node.get("GPU", 0)) if gpus else by_cpus)


def _free(threads: int, gpus: bool, wanted: int) -> int:
    """How many of the wanted workers others leave room for; what an earlier stage held is free again within seconds."""
    for _ in range(10):
        if (free := _room(ray.available_resources(), threads, gpus)) >= wanted:
            break
        time.sleep(0.5)
    return min(free, wanted)


def _storage(work: UPath) -> dict[str, Any]:
    if is_local(work):
        return {"storage_path": work.path}
    return {"storage_path": work.path, "storage_filesystem": PyFileSystem(FSSpecHandler(work.fs))}


def _explained(error: TrainingFailedError) -> Exception:
    """The user's own mistake where a worker met one, else what ended the run."""
    _, *failures = causes(error)
    for failure in failures:
        if isinstance(failure, InputError | ClusterError):
            return type(failure)(str(failure))
        if isinstance(failure, OSError) and failure.errno:
            return ClusterError(f"a training worker failed: {failure}; run the same command again to go on.")
    told = (str(failure).strip().splitlines() for failure in failures)
    reason = next((lines[-1] for lines in told if lines), str(error))
    return ClusterError(f"training ended early: {reason}; run the same command again to go on.")


@contextlib.contextmanager
def _showing(bulletin: Any, progress: Progress) -> Iterator[None]:
    """Shows the bulletin's news while the block runs."""
    done, started = threading.Event(), time.monotonic()
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
                elif time.monotonic() - started > _SOON_SECONDS:
                    step.update(0, "no worker has started yet; is the cluster busy with something else?")

        thread = threading.Thread(target=show, daemon=True, name="news")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _train_worker(config: dict[str, Any]) -> Outcome:
    """What each worker runs (from the start, after every restart); the first one's outcome is the run's."""
    job: WorkerJob = config["job"]
    settings, context = job.settings, ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(settings.threads)
    state = train_lanes(job, RayReporter(config["bulletin"], rank), rank, workers, get_device())
    return Outcome(state, workers)
