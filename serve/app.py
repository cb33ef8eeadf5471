"""Bringing the endpoint up and taking it down, on a Ray cluster that is connected already."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve as ray_serve
from ray._private.state import available_resources_per_node
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.deployment import Application
from ray.serve.schema import ApplicationStatus, LoggingConfig
from upath import UPath

from cluster.connect import room_for
from cluster.store import ClusterError
from models.settings import InputError
from serve import shedding
from serve.classifier import Classifier
from serve.exposure import check_exposure
from serve.guard import SETTINGS_VARIABLE, STORE_VARIABLE
from serve.ingress import start_ingress, stop_ingress, url_of
from serve.model import ServedModel
from serve.names import with_names
from serve.ownership import claiming, give_up, standing
from serve.scaling import TokenPolicy
from serve.settings import ServeSettings
from serve.traffic import read_table, remove_table
from serve.turning import APPLICATION, await_replicas, next_table, put_back, running_replicas, turn
from serve.versions import VERSIONS, publish_version, versions_deployment

_BEYOND_QUEUE = 1000
"""Requests in progress that Ray lets through beyond our queue, so that it is we who refuse (429) and not Ray."""

_SURGE_PERCENT = 20
"""Replicas of a new version that start before old ones of the former stop: one to every five, one at least."""

_ROOM_S = 600.0
"""Seconds that a replica for other versions has to start, a new node included."""


def serve_model(
    settings: ServeSettings,
    model: ServedModel,
    store: UPath | None = None,
    others: Mapping[str, ServedModel] | None = None,
) -> str:
    """Serves a classifier and returns its URL once the replicas answer; a second call replaces the first's model.

    Args:
        settings: the endpoint's.
        model: what answers.
        store: the root of the store that holds the API keys, where they are demanded.
        others: by name in `/models/NAME/...`, what answers there.

    Raises:
        ClusterError: the port is taken, or the replicas do not start.
        InputError: there is no such classifier, the address cannot work on this cluster, or no key opens the endpoint;
            a file of names cannot be read; or samples are asked for, but there is no store.
    """
    if settings.sample is not None and store is None:
        raise InputError("serve.sample keeps samples in the store, but this endpoint was given none.")
    settings = with_names(settings)
    for each in (model, *(others or {}).values()):
        each.check(settings)
    check_exposure(settings, store)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # One starts in any case: what does not is told now and not at a request.
    replicas = max(1, settings.min_replicas) + bool(others)
    what = "a replica" if replicas == 1 else f"{replicas} replicas"
    room_for(replicas * settings.cpus, replicas * settings.gpus, what, "serve.min_replicas, serve.cpus or serve.gpus")
    sheds = start_ingress(settings)
    with claiming():
        before = read_table()
        at = {name: publish_version(each) for name, each in (others or {}).items()}
        table = next_table(model=model.as_json(), others=at, candidate=None)
        try:
            if others:
                _deploy_versions(settings, store)
            _deploy(settings, store, sheds=sheds)
            await_replicas(table)
        except BaseException:  # Ctrl-C too.
            if before is not None:
                put_back(before, table)
            raise
        if before is not None and not others:
            stop_versions()  # Whose settings are the former endpoint's.
    return url_of(settings)


def turn_others(others: Mapping[str, ServedModel]) -> None:
    """Lets these versions answer at `/models/NAME/...`, of an endpoint that has such paths.

    Raises:
        ClusterError: a replica does not follow.
    """
    turn(others={name: publish_version(each) for name, each in others.items()})


def start_versions(settings: ServeSettings, store: UPath | None = None) -> None:
    """Starts the replicas that hold other versions, unless they are there.

    Raises:
        ClusterError: they do not start.
    """
    if not running_replicas(VERSIONS):
        _deploy_versions(with_names(settings), store)


def _deploy_versions(settings: ServeSettings, store: UPath | None) -> None:
    """Starts the replicas that hold other versions, or others in their place. Does not wait for ever: on a full cluster
    there may never be room.
    """
    application: Application = (
        versions_deployment(settings).options(**_options(settings, store, VERSIONS)).bind(settings)
    )
    ray_serve.api._run(application, _blocking=False, name=VERSIONS, route_prefix=None)
    until = time.monotonic() + _ROOM_S
    while True:
        found = ray_serve.status().applications.get(VERSIONS)
        if found is not None and found.status == ApplicationStatus.RUNNING and running_replicas(VERSIONS):
            return
        if found is None or found.status == ApplicationStatus.DEPLOY_FAILED:
            raise ClusterError(
                f"replicas for other versions do not start: {_reason(VERSIONS) or 'they were taken away'}"
            )
        if time.monotonic() > until:
            stop_versions()
            raise ClusterError(
                f"a replica for other versions found no room within {_ROOM_S:g} s: it needs {settings.cpus:g} CPUs and "
                f"{settings.gpus:g} GPUs beside the endpoint's replicas; lower serve.max_replicas, or add a node."
            )
        time.sleep(0.5)


def stop_versions() -> None:
    """Takes the replicas that hold other versions away, if they are there."""
    ray_serve.delete(VERSIONS)


def _deploy(settings: ServeSettings, store: UPath | None, *, sheds: bool) -> None:
    options = _options(settings, store, APPLICATION, sheds=sheds)
    try:
        ray_serve.run(Classifier.options(**options).bind(settings), name=APPLICATION, route_prefix="/")  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise ClusterError(f"the endpoint does not start: {_reason(APPLICATION) or error}") from error


def _options(settings: ServeSettings, store: UPath | None, name: str, *, sheds: bool = False) -> dict[str, Any]:
    """How the deployment of an application scales, what a replica takes and knows."""
    least = settings.min_replicas if name == APPLICATION else 1
    return {
        "max_ongoing_requests": settings.max_queued + _BEYOND_QUEUE,
        "max_queued_requests": -1,
        "max_constructor_retry_count": 2,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=least,
            initial_replicas=min(max(1, least, running_replicas(name)), settings.max_replicas),
            max_replicas=settings.max_replicas,
            policy=AutoscalingPolicy(
                policy_function=TokenPolicy,
                policy_kwargs={"target_wait_s": settings.target_wait_s, "target_busy": settings.target_busy},
            ),
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
            downscale_to_zero_delay_s=settings.rest_after_s,
            metrics_interval_s=1,
            look_back_period_s=max(2, settings.upscale_delay_s),
        ),
        "ray_actor_options": {
            "num_cpus": settings.cpus,
            "num_gpus": settings.gpus,
            "runtime_env": _runtime_env(settings, store, sheds=sheds),
        },
        "graceful_shutdown_timeout_s": settings.drain_s,
        "max_surge_percent": _SURGE_PERCENT if _fits_one_more(settings) else 0,
        "logging_config": LoggingConfig(enable_access_log=False, log_level="WARNING", encoding="JSON"),
    }


def stop() -> None:
    """Takes the endpoint down, its HAProxy too; unless another process has served since, whose it is."""
    if standing() in ("ours", "gone"):
        stop_ingress()
    if standing() in ("ours", "gone"):  # Another one may have come meanwhile.
        remove_table()
        give_up()


def _fits_one_more(settings: ServeSettings) -> bool:
    """Whether a node has room for a replica beside those that run.

    Without it Ray has to stop one before its successor starts: the successor would wait for its room for ever.
    """
    wanted = {"CPU": settings.cpus, "GPU": settings.gpus}
    nodes = available_resources_per_node().values()
    return any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes)


def _runtime_env(settings: ServeSettings, store: UPath | None, *, sheds: bool) -> dict[str, Any]:
    """The job's runtime environment with what `serve.limits`, `serve.guard` and `serve.shedding` need."""
    environment = dict(ray.get_runtime_context().runtime_env)
    variables = {
        **environment.get("env_vars", {}),
        # Without names to mask, which may be more than an environment holds; they come with the deployment.
        SETTINGS_VARIABLE: settings.model_dump_json(exclude={"redact", "sample"}),
        **({STORE_VARIABLE: str(store)} if store is not None else {}),
        **({shedding.VARIABLE: "1"} if sheds else {}),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.limits.middlewares",
    }
    return {**environment, "env_vars": variables}


def _reason(name: str) -> str:
    """Why the replicas do not start, in Ray's last words."""
    application = ray_serve.status().applications.get(name)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1].rpartition("InputError: ")[2] if lines else ""
