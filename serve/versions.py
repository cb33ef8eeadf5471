"""Replicas that hold versions of any models, each loaded when it is first asked; the least recently used makes room.

They have no HTTP face: replicas of `serve.classifier` hand them whole requests (`serve.front`), those to other models
and those of a rollout's candidate. Each version answers by a gateway of its own, so in any way that an endpoint can.
"""

import asyncio
import json
from functools import partial
from typing import Any

from ray import serve as ray_serve

from serve.exchange import Exchange, MetricsExchange
from serve.forwarding import Asked, Reply, reply_of
from serve.loaded import Loaded
from serve.logs import log_into_replica_file
from serve.metrics import merged
from serve.model import ServedModel
from serve.request_log import RequestLines, RequestLog
from serve.settings import ServeSettings

VERSIONS = "shoal-versions"
"""The application."""


def publish_version(model: ServedModel) -> str:
    """Tells replicas, present and to come, what a version is; gives what it is asked for by."""
    Exchange(VERSIONS, model.identity).put(json.dumps(model.as_json()))
    return model.identity


def _published(identity: str) -> ServedModel:
    text = Exchange(VERSIONS, identity).get()
    if text is None:
        raise KeyError(f"nobody has said what {identity} is")
    return ServedModel.from_json(json.loads(text))


def versions_deployment(settings: ServeSettings) -> Any:
    """The deployment, whose replicas hold `serve.models_per_replica` versions each."""

    @ray_serve.deployment
    class Versions:
        """One replica."""

        def __init__(self, settings: ServeSettings) -> None:
            self._settings = settings
            self._replica = ray_serve.get_replica_context().replica_id.unique_id
            self._loaded: dict[str, Loaded] = {}
            log_into_replica_file()
            MetricsExchange(self._replica).start(lambda: merged(each.page() for each in list(self._loaded.values())))

        @ray_serve.multiplexed(  # type: ignore[untyped-decorator]
            max_num_models_per_replica=settings.models_per_replica
        )
        async def version(self, identity: str) -> Loaded:
            """A version, ready to answer."""
            model = await asyncio.to_thread(_published, identity)
            loaded = await asyncio.to_thread(partial(Loaded, model, self._settings, self._replica))
            kept = list(self._loaded.items())
            for _, each in kept[settings.models_per_replica - 1 :]:
                await asyncio.to_thread(each.close)
            self._loaded = {identity: loaded, **dict(kept[: settings.models_per_replica - 1])}
            return loaded

        async def respond(self, asked: Asked) -> Reply:
            """What the version that the request was marked with answers."""
            loaded = await self.version(ray_serve.get_multiplexed_model_id())
            lines = RequestLines(self._settings.log_requests)
            loaded.describe(lines)
            return await reply_of(RequestLog(loaded.gateway, lines), asked)

        def __del__(self) -> None:
            """Ray calls it at the replica's end."""
            for each in self._loaded.values():
                each.close()

        async def record_autoscaling_stats(self) -> dict[str, float]:
            """What autoscaling goes by; Ray asks for it every moment."""
            told = [each.load() for each in list(self._loaded.values())]
            return {name: sum(each[name] for each in told) for name in (told[0] if told else {})}

    return Versions
