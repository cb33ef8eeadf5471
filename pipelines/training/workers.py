"""Training workers on Ray: starts groups of them, tells how far they are, and keeps the history of the groups."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train.torch import get_device
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from cluster.connect import room_for
from cluster.logs import causes, last_line
from cluster.memory import training_environment
from cluster.nodes import draining, room
from cluster.store import STORAGE_ERRORS, ClusterError, is_local, write_whole
from models.settings import InputError
from pipelines.progress import Progress
from pipelines.training.bulletin import Bulletin
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.elastic import ElasticTrainer
from pipelines.training.interruptions import GROUPS
from pipelines.training.pace import Pace
from pipelines.training.state import FitState
from pipelines.training.worker import WorkerJob, train_lanes

_LOOK_SECONDS = 0.5
_WRITE_SECONDS = 5.0
_SOON_SECONDS = 60.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: FitState
    workers: int
    groups: list[dict[str, Any]]
    """Of workers, that worked on the run one after another (`pipelines.training.bulletin.Bulletin`)."""


class RayChannel:
    """Carries news to the bulletin and orders from there; orders the workers to leave a node that is going away."""

    def __init__(self, bulletin: Any, settings: Any, rank: int, workers: int) -> None:
        self._bulletin, self._rank, self._workers = bulletin, rank, workers
        self._bounds = settings.checkpoint_seconds
        self._leave = False

    def began(self, steps: int) -> Pace:
        """Has the first worker tell, and look out for orders from now on."""
        pace = Pace(self._bounds.min, self._bounds.max)
        context = ray.get_runtime_context()
        places: list[Any] = [(context.get_node_id(), ray.util.get_node_ip_address())] * self._workers
        if self._workers > 1:
            dist.all_gather_object(places, places[0])
        if self._rank:
            return pace
        nodes = dict(places)
        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        groups = ray.get(self._bulletin.began.remote(steps, self._workers, nodes, alive))
        pace.failures = sum(not group.get("ordered") for group in groups[:-1])
        pace.seconds = sum(group["last_seen"] - group["began"] for group in groups)
        threading.Thread(target=self._look_out, args=(set(nodes),), daemon=True, name="orders").start()
        return pace

    def ordered_to_leave(self) -> bool:
        """What the last look said."""
        return self._leave

    def news(self, values: dict[str, Any]) -> None:
        """Posts without waiting for an answer."""
        if self._rank == 0:
            self._bulletin.post.remote(values)

    def tell(self, sentence: str) -> None:
        """For the user to see."""
        if self._rank == 0:
            self._bulletin.tell.remote(sentence)

    def _look_out(self, nodes: set[str]) -> None:
        while not self._leave:
            time.sleep(_LOOK_SECONDS)
            with contextlib.suppress(Exception):  # The head may be busy or away for a while.
                if going := nodes & draining().keys():
                    ray.get(self._bulletin.order_to_leave.remote(f"{len(going)} of its nodes were to be taken away"))
                self._leave = ray.get(self._bulletin.order.remote()) is not None


def train(job: WorkerJob, progress: Progress) -> Outcome:
    """Runs the job's workers to the end, from the last checkpoint where there is one.

    Raises:
        InputError: a worker met a mistake of the user's.
        ClusterError: workers were lost again and again without getting on, or nothing more can be written.
    """
    settings, section = job.settings, job.lesson.section
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    room_for(settings.threads, int(gpus), "a training worker", f"{section}.threads")
    per_worker = {"CPU": float(settings.threads)} | ({"GPU": 1.0} if gpus else {})
    wanted = settings.workers
    least = (settings.threads * wanted.min, int(gpus) * wanted.min)
    room_for(*least, f"{wanted.min} training workers", f"{section}.workers.min")
    if (total := room(per_worker, {}).total) < wanted.max:
        progress.tell(
            f"  there is room for {total or 'none'} of {wanted.max} workers now; training starts with "
            f"{'those' if total >= wanted.min else 'the first that find room'} and ends in the same weights"
        )
    history = job.work / GROUPS
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # On this node, for the run goes on without all others.
    actor: Any = ray.remote(Bulletin)
    bulletin = actor.options(num_cpus=0, scheduling_strategy=here).remote(_earlier(history))
    trainer: Any = ElasticTrainer(
        bulletin,
        settings.resize_seconds,
        train_loop_per_worker=_train_worker,
        # By reference: the controller, which would import all that trains with it, has no use for it.
        train_loop_config={"job": ray.put(job), "bulletin": bulletin},
        scaling_config=ScalingConfig(
            num_workers=(wanted.min, wanted.max), use_gpu=gpus, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            name="train",
            failure_config=FailureConfig(max_failures=settings.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={} if gpus else {"env_vars": training_environment()},
            **storage_of(job.work),
        ),
    )
    with _showing(bulletin, history, progress, job.unit):
        try:
            state, workers = trainer.fit().return_value
        except TrainingFailedError as error:
            raise _explained(error) from error
        groups = ray.get(bulletin.read.remote())["groups"]
    return Outcome(state, workers, groups)


def _earlier(history: UPath) -> list[dict[str, Any]]:
    """The groups of commands before this one, the last of which was broken off."""
    if not history.exists():
        return []
    groups: list[dict[str, Any]] = json.loads(history.read_text(encoding="utf-8"))
    if groups:
        groups[-1].setdefault("cause", "the command was broken off")
        groups[-1].pop("nodes", None)  # They may be gone since then.
    return groups


def storage_of(work: UPath) -> dict[str, Any]:
    """A run's folder, as Ray wants to have it said."""
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
    reason = next((last_line(failure) for failure in failures if str(failure).strip()), str(error))
    return ClusterError(f"training ended early: {reason}; run the same command again to go on.")


@contextlib.contextmanager
def _showing(bulletin: Any, history: UPath, progress: Progress, unit: str) -> Iterator[None]:
    """Shows the bulletin's news while the block runs, and keeps the history of the groups in the store."""
    done, started = threading.Event(), time.monotonic()
    with progress.step("training") as step:

        def show() -> None:
            told, kept, ended = 0, _Kept(history), False
            while not ended:
                ended = done.wait(0.5)
                try:
                    news = ray.get(bulletin.read.remote(), timeout=5)
                except ray.exceptions.RayError:
                    continue
                for sentence in news.get("told", [])[told:]:
                    told += 1
                    progress.tell(f"  {sentence}", "yellow")
                step.update(
                    news.get("steps", 0), _note(news, time.monotonic() - started, unit), total=news.get("total")
                )
                kept.keep(news["groups"], at_once=ended)

        thread = threading.Thread(target=show, daemon=True, name="news")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class _Kept:
    """The history of the groups as it stands in the store: written at once when one begins or ends."""

    def __init__(self, history: UPath) -> None:
        self._history, self._known, self._written = history, "", float("-inf")

    def keep(self, groups: list[dict[str, Any]], *, at_once: bool) -> None:
        """Writes it, where that is due."""
        known = json.dumps([(group["began"], group.get("cause")) for group in groups])
        now = time.monotonic()
        if known == self._known and not at_once and now - self._written < _WRITE_SECONDS:
            return
        with contextlib.suppress(*STORAGE_ERRORS):  # It says how the run went, and the run goes on without it.
            write_whole(self._history, json.dumps(groups))
        self._known, self._written = known, now


def _note(news: Mapping[str, Any], seconds: float, unit: str = "texts") -> str:
    """The news in a line."""
    if news.get("waiting"):
        return f"waits: there is {news['waiting']}"
    if "steps" not in news:
        return "no worker has started yet; is the cluster busy with something else?" if seconds > _SOON_SECONDS else ""
    interruptions = len(news["groups"]) - 1
    parts = [
        f"{news.get('workers', '?')} of {news.get('wanted', '?')} workers",
        f"loss {news['loss']:.3f}",
        f"{news[f'{unit}_per_second']:,.0f} {unit}/s",
        f"{news['padding_share']:.0%} padding",
        *(f"{name} {value:.3f}" for name, value in list(news["validation"].items())[:1]),
        f"checkpoint {news.get('checkpoint_age', 0):.0f} s ago",
        f"{interruptions} interruptions" if interruptions else "",
    ]
    return ", ".join(part for part in parts if part)


def _train_worker(config: dict[str, Any]) -> tuple[FitState, int]:
    """What each worker runs (from the start, after every restart); the first one's outcome is the run's."""
    job: WorkerJob = ray.get(config["job"])
    settings, context = job.settings, ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(settings.threads)
    channel = RayChannel(config["bulletin"], settings, rank, workers)
    checkpoints = Checkpoints(job.work / "checkpoints", channel.tell, rank, workers)
    state = train_lanes(job, checkpoints, channel, rank, workers, get_device())
    return state, workers
