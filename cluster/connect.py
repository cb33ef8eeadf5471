"""Joining a Ray cluster, or making a small one on this machine for the length of a command."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import ray

from cluster.store import ClusterError

# Read by Ray's processes when they start, so they are set before a local cluster is made; on a cluster made
# by `ray up` the same settings stand in cluster.yaml.
ENVIRONMENT = {
    # Ray 2.60 turns token authentication on by itself and writes a token file under the home folder, which
    # every later cluster of that user then demands. A cluster on loopback for one command needs none.
    "RAY_AUTH_MODE": "disabled",
    # Requests go from HAProxy straight to a replica instead of through Ray's Python proxy, which costs
    # more than the model does.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # A replica that is taken down waits this long for HAProxy to hear of it; the default is 30 s.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # The end of a run, a lost worker and one that has left are noticed at the next health check (2 s); more often than
    # this costs the workers' processors more than it gains.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # How long room for a group of workers is waited for before it is looked for anew, when a node has died meanwhile or
    # others were faster (60 s).
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    # Training workers look out for nodes that are going away themselves (pipelines/training/workers.py): Ray Train's
    # watcher would keep the group waiting until the node is gone.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # When a host that does not answer is given up (30 s and more): 5 times 2 s, a second apart.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Of a cluster that lives as long as one command nobody reads Ray's own metrics; collecting them takes a part of what
# its idle processes cost.
UNWATCHED = {
    "RAY_enable_open_telemetry": "0",
    "RAY_event_stats": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
}


@contextlib.contextmanager
def connected(
    address: str | None = None,
    *,
    cpus: int | None = None,
    object_store_bytes: int | None = None,
    watched: bool = False,
) -> Iterator[None]:
    """A connection to Ray while the block runs.

    Joins `address`, else the cluster that RAY_ADDRESS names (as it does inside a submitted job), else makes
    a cluster on this machine and takes it down again afterwards; `watched` ones keep Ray's own metrics. Does nothing
    where Ray is connected already.

    Raises:
        ClusterError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local = address == "local"
    for name, value in (ENVIRONMENT if watched or not local else ENVIRONMENT | UNWATCHED).items():
        os.environ.setdefault(name, value)
    try:
        ray.init(
            address=address,
            num_cpus=cpus if local else None,
            object_store_memory=object_store_bytes if local else None,
            include_dashboard=False if local else None,
            configure_logging=True,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except Exception as error:  # Ray raises bare ones too, where a machine is too slow to start it in time.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        place = "Ray cannot be started on this machine" if local else f"no Ray cluster answers at {address}"
        raise ClusterError(f"{place}: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


def room_for(cpus: float, gpus: float, what: str, setting: str) -> None:
    """Makes sure that `what` can ever start; a cluster that this command made for itself does not grow.

    Raises:
        ClusterError: names what is there and the setting to lower.
    """
    if not is_own():
        return
    there = ray.cluster_resources()
    for wanted, name in ((cpus, "CPU"), (gpus, "GPU")):
        if wanted > there.get(name, 0):
            raise ClusterError(
                f"{what}: {wanted:g} {name}s are needed, but this machine has {there.get(name, 0):g}; lower {setting}."
            )


def require_shared(store: str) -> None:
    """Makes sure that all hosts of the cluster can reach the store.

    Raises:
        ClusterError: `store` (as the user gave it) is a relative path, and work is done on other hosts than this.
    """
    if is_own() or "://" in store or Path(store).expanduser().is_absolute():
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len({node["NodeManagerHostname"] for node in nodes}) > 1 or not any(
        node["Resources"].get("CPU", 0) for node in nodes
    ):
        raise ClusterError(
            f"the store {store} is a folder of this host, but the cluster works on others; give one that all reach: "
            "store=s3://BUCKET/PREFIX, or an absolute path on a shared filesystem."
        )


def is_own() -> bool:
    """Whether this process made the cluster, for itself alone."""
    node = getattr(ray._private.worker, "_global_node", None)
    return node is not None and bool(node.is_head())
