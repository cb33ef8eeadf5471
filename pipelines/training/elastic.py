"""When Ray Train starts, grows, shrinks and gives up a group of training workers.

Ray Train's own elastic policy goes by a list of nodes that is up to 20 s old, counts nodes that are being drained or
whose raylet has just died, and goes by what nodes have, not by what is free on them: a group is then asked for that
cannot start, and the next try comes a minute later. It tears a group down to resize it without telling it before. Its
failure policy counts lost workers over the whole run, so that a long one on nodes that are reclaimed must end.

These policies look at the nodes as they are now (`cluster.nodes`), have the workers take a checkpoint and leave before
they are resized, and count failures only as long as nothing is gained between them.
"""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from cluster.logs import causes, last_line
from cluster.nodes import room
from cluster.store import ClusterError
from models.settings import InputError
from pipelines.training.state import LeftError

_LOOK_SECONDS = 1.0
_SETTLE_SECONDS = 3.0


_Trainer: Any = TorchTrainer
"""Typed as the first generation of Ray Train, which it is not."""


class ElasticTrainer(_Trainer):  # type: ignore[misc]
    """A TorchTrainer with the policies below."""

    def __init__(self, bulletin: Any, least_seconds: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._bulletin, self._least_seconds = bulletin, least_seconds

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["scaling_policy"] = NodesNow(self.scaling_config, self._bulletin, self._least_seconds)
        arguments["failure_policy"] = WhileItGetsOn(self.run_config.failure_config, self._bulletin)
        return super()._initialize_and_run_controller(**arguments)

    def _create_default_callbacks(self) -> list[Any]:
        """Without one that starts an actor for data sets with each group of workers; here there are none."""
        found: list[Any] = super()._create_default_callbacks()
        return [each for each in found if not isinstance(each, DatasetsCallback)]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leaves Ctrl-C to the command: Ray's handler waits for the controller, which may itself wait for room."""


class TidyGroup(WorkerGroup):
    """A group that gives its resources back where one of its workers is lost while it starts."""

    def _start(self) -> None:
        try:
            super()._start()  # type: ignore[no-untyped-call]
        except Exception:
            if self._worker_group_state is not None:  # Ray tidies up only before.
                self._worker_group_state.shutdown()
                self._clear_state()  # type: ignore[no-untyped-call]
            raise


# The controller's process imports this module with the policies.
TrainController.worker_group_cls = TidyGroup


class NodesNow(ElasticScalingPolicy):
    """As many workers as there is room for now, on nodes that answer and stay."""

    def __init__(self, scaling_config: ScalingConfig, bulletin: Any, least_seconds: float) -> None:
        """`least_seconds`: a group works at least that long before it is made larger."""
        super().__init__(scaling_config)
        self._bulletin, self._least_seconds = bulletin, least_seconds
        self._held: Counter[str] = Counter()
        self._waiting_since: float | None = None
        self._looked = float("-inf")
        self._seen_larger = False

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """A group of the size that fits; none below the least number of workers, which is told."""
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        config, now = self.scaling_config, time.monotonic()
        per_worker = config._resources_per_worker_not_none
        try:
            # What the last group holds is given back when the next one is decided on.
            there = room(per_worker, self._held)
        except Exception:  # The head is busy or away; from here Ray Train would give the run up.
            return self._later()
        free, total = min(there.free, config.max_workers), min(there.total, config.max_workers)
        self._waiting_since = self._waiting_since or now
        settled = now - self._waiting_since > _SETTLE_SECONDS
        if free < config.min_workers or (free < total and not settled):
            if not settled:
                return self._later()
            kind = "free room" if total >= config.min_workers else "room"
            self._bulletin.post.remote({"waiting": f"{kind} for {free} of at least {config.min_workers} workers"})
            if total < config.min_workers:
                return self._later()
            # Others hold it, or a group that ended before it was seen here; the placement group waits for it a while.
            free = config.min_workers
        self._waiting_since, self._seen_larger, self._held = None, False, Counter()
        self._bulletin.post.remote({"wanted": config.max_workers})
        return ResizeDecision(num_workers=free, resources_per_worker=per_worker)

    @staticmethod
    def _later() -> ScalingDecision:
        time.sleep(0.25)  # The controller asks again at once.
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Never resizes by itself: has the workers take a checkpoint and leave where there is room for more."""
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        config, now = self.scaling_config, time.monotonic()
        workers = worker_group_state.num_workers
        self._held = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        too_soon = time.monotonic() - worker_group_state.start_time < self._least_seconds
        if workers >= config.max_workers or too_soon or now - self._looked < _LOOK_SECONDS:
            return NoopDecision()
        self._looked = now
        try:
            possible = min(room(config._resources_per_worker_not_none, self._held).free, config.max_workers)
        except Exception:  # As above.
            return NoopDecision()
        if possible > workers and self._seen_larger:
            reason = f"room for {possible} workers instead of {workers}"
            self._bulletin.order_to_leave.remote(reason, self._least_seconds)
        self._seen_larger = possible > workers
        return NoopDecision()


class WhileItGetsOn(FailurePolicy):
    """Tries again as long as the run gets on: only failures without a step gained between them are counted."""

    def __init__(self, failure_config: FailureConfig, bulletin: Any) -> None:
        super().__init__(failure_config)
        self._bulletin = bulletin
        self._furthest, self._failures = -1, 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Gives up on a user's mistake, and after `max_failures` that gained nothing."""
        found = list(causes(training_failed_error))
        if any(isinstance(error, InputError | ClusterError) for error in found):
            return FailureDecision.RAISE
        if any(isinstance(error, LeftError) for error in found):
            self._bulletin.ended.remote()
            return FailureDecision.RETRY
        if any(isinstance(error, WorkerGroupStartupTimeoutError) for error in found):
            return FailureDecision.RETRY  # It waits for room.
        news: Mapping[str, Any] = ray.get(self._bulletin.read.remote())
        furthest = news.get("furthest", 0)
        self._failures = 1 if furthest > self._furthest else self._failures + 1
        self._furthest = max(furthest, self._furthest)
        self._bulletin.ended.remote(_told(training_failed_error))
        return FailureDecision.RAISE if self._failures > self.failure_config.max_failures else FailureDecision.RETRY


def _told(error: TrainingFailedError) -> str:
    """Why a group ended, in a few words."""
    if isinstance(error, ControllerError):
        return "workers could not be started"
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    for rank, failure in failures.items():
        dead = getattr(failure, "health_check_failure", failure)
        if isinstance(dead, ray.exceptions.RayActorError):
            node_died = "node died" in str(dead).lower() or "node failure" in str(dead).lower()
            return f"worker {rank} was lost{' with its node' if node_died else ''}"
    rank, failure = next(iter(failures.items()), (0, error))
    said = last_line(failure)
    if "gloo/transport" in said:
        return f"worker {rank} lost its connection to another"
    if isinstance(failure, dist.DistError) or "NCCL" in said:
        return f"worker {rank} lost its connection to another, it seems: {said}"
    return f"worker {rank}: {said}"
