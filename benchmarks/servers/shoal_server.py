"""Shoal's endpoint: python shoal_server.py PORT ENGINE MIN_REPLICAS MAX_REPLICAS tokens|default."""

import os
import signal
import sys
from typing import Any

from ray.serve.config import AutoscalingConfig
from starlette.middleware import Middleware
from upath import UPath

from cluster.connect import connected
from serve import app
from serve.direct import PastRay
from serve.limits import middlewares
from serve.model import ServedModel
from serve.settings import ServeSettings


def counted_by_ray() -> list[Middleware]:
    """What stands around a replica's server, without what leads requests past Ray, who would not count them."""
    return [each for each in middlewares() if each.cls is not PastRay]


def scale_by_default(settings: ServeSettings) -> None:
    """The same endpoint, scaled as Ray Serve does it where nothing is said: by requests in progress."""
    ours = app._options

    def options(*arguments: Any, **named: Any) -> dict[str, Any]:
        default = AutoscalingConfig(min_replicas=settings.min_replicas, max_replicas=settings.max_replicas)
        found = ours(*arguments, **named)
        variables = found["ray_actor_options"]["runtime_env"]["env_vars"]
        variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "shoal_server.counted_by_ray"
        return {**found, "autoscaling_config": default}

    app._options = options


if __name__ == "__main__":
    port, engine, least, most, policy = sys.argv[1:]
    settings = ServeSettings(port=int(port), engine=engine, min_replicas=int(least), max_replicas=int(most))
    model = ServedModel("minilm", "bench", UPath(os.environ["MODEL"]), UPath(os.environ["ONNX"]))
    if policy == "default":
        scale_by_default(settings)
    with connected("local", cpus=4):
        app.serve_model(settings, model)
        try:
            signal.sigwait({signal.SIGTERM, signal.SIGINT})
        finally:
            app.stop()
