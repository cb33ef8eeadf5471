"""Replicas that hold versions of any models, each loaded when it is first asked; the least recently used makes room.

They have no HTTP face: replicas of `serve.classifier` hand them whole requests (`serve.front`), those to other models
and those of a rollout's candidate. Each version answers by a gateway of its own, so in any way that an endpoint can.
"""

import asyncio
import json
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.exchange import Exchange, MetricsExchange
from serve.forwarding import Asked, Reply, reply_of
from serve.loaded import Loaded, free_dropped
from serve.logs import log_into_replica_file
from serve.metrics import merged
from serve.model import ServedModel
from serve.request_log import RequestLines, RequestLog
from serve.scaling import BUSY, QUEUED, REFUSED, REQUESTS, SPEED
from serve.settings import ServeSettings

VERSIONS = "shoal-versions"
"""The application."""


def publish_version(model: ServedModel) -> str:
    """Tells replicas, present and to come, what a version is; gives what it is asked for by."""
    Exchange(VERSIONS, model.identity).put(json.dumps(model.as_json()))
    return model.identity


def version_handle(identity: str, *, own_loop: bool = False) -> DeploymentHandle[Any]:
    """What a published version is asked by.

    Args:
        identity: the version's.
        own_loop: give the handle an event loop of its own, for a process that has none. Replicas' handles share theirs,
            by an environment that a job on their cluster inherits.
    """
    handle = ray_serve.get_app_handle(VERSIONS)
    if own_loop and not handle.is_initialized:  # Ray hands out one handle again and again.
        handle._init(_run_router_in_separate_loop=True)
    return handle.options(method_name="respond", multiplexed_model_id=identity)


def _published(identity: str) -> ServedModel:
    text = Exchange(VERSIONS, identity).get()
    if text is None:
        raise KeyError(f"nobody has said what {identity} is")
    return ServedModel.from_json(json.loads(text))


class _Held:
    """A place in Ray's cache of versions. Ray calls `__del__` when it needs the place, and Python may again."""

    def __init__(self, loaded: Loaded, forget: Callable[[], None]) -> None:
        self.loaded = loaded
        self._forget: Callable[[], None] | None = forget

    def __del__(self) -> None:
        forget, self._forget = self._forget, None
        if forget is not None:
            forget()


def _let_go(loaded: Loaded) -> None:
    loaded.close()
    del loaded
    free_dropped()


def versions_deployment(settings: ServeSettings) -> Any:
    """The deployment, whose replicas hold `serve.models_per_replica` versions each."""

    @ray_serve.deployment
    class Versions:
        """One replica."""

        def __init__(self, settings: ServeSettings) -> None:
            # How many replicas there are to be is told by those with an HTTP face.
            self._settings = settings.model_copy(update={"min_replicas": 0})
            self._replica = ray_serve.get_replica_context().replica_id.unique_id
            self._loaded: dict[str, Loaded] = {}
            log_into_replica_file()
            MetricsExchange(self._replica).start(lambda: merged(each.page() for each in list(self._loaded.values())))

        @ray_serve.multiplexed(  # type: ignore[untyped-decorator]
            max_num_models_per_replica=settings.models_per_replica
        )
        async def version(self, identity: str) -> _Held:
            """Has a version ready to answer."""
            model = await asyncio.to_thread(_published, identity)
            replica = f"{self._replica}/{identity}"
            loaded = self._loaded[identity] = await asyncio.to_thread(Loaded, model, self._settings, replica)
            return _Held(loaded, partial(self._forget, identity, loaded))

        def _forget(self, identity: str, loaded: Loaded) -> None:
            """Lets a version go; requests under way hold it until they are answered."""
            if self._loaded.get(identity) is loaded:
                del self._loaded[identity]
            threading.Thread(target=_let_go, args=(loaded,), name="forget", daemon=True).start()

        async def respond(self, asked: Asked) -> Reply:
            """What the version that the request was marked with answers."""
            held = await self.version(ray_serve.get_multiplexed_model_id())
            # The line of the request is written where it came in; this one is for what must not reach Ray's log.
            return await reply_of(RequestLog(held.loaded.gateway, RequestLines("none")), asked)

        def __del__(self) -> None:
            """Ray calls it at the replica's end."""
            for each in list(self._loaded.values()):
                each.close()

        async def record_autoscaling_stats(self) -> dict[str, float]:
            """What autoscaling goes by; Ray asks for it every moment."""
            told = [each.load() for each in list(self._loaded.values())]
            found = {name: sum(each[name] for each in told) for name in (QUEUED, BUSY, REFUSED, REQUESTS)}
            computed = sum(each[SPEED] * each[BUSY] for each in told)
            fastest = max((each[SPEED] for each in told), default=0.0)
            return {**found, SPEED: computed / found[BUSY] if found[BUSY] else fastest}

    return Versions
