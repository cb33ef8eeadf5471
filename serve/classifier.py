"""The deployment: each replica holds the HTTP face and the engine, so a plain request crosses no second process."""

from typing import Any

import numpy as np
from ray import serve as ray_serve
from starlette.types import ASGIApp
from upath import UPath

from cluster.store import local_copy
from models.engine import TorchEngine, load_engine
from models.settings import InputError
from serve import limits
from serve.exchange import MetricsExchange
from serve.gateway import build_gateway
from serve.settings import ServeSettings


@ray_serve.deployment
@ray_serve.ingress()
class Classifier:
    """One replica: loads the classifier, warms it up, and answers.

    Ray calls it ready, and sends it requests, only after its constructor.
    """

    def __init__(
        self,
        settings: ServeSettings,
        name: str,
        version: str,
        model_folder: UPath,
        card: dict[str, Any],
        temperature: dict[str, float],
    ) -> None:
        threads = max(1, round(settings.cpus))
        with local_copy(model_folder) as folder:
            engine = load_engine(folder, precision=settings.precision, threads=threads, temperature=temperature)
        warm_up(engine, settings.batch_tokens)
        replica = ray_serve.get_replica_context().replica_id.unique_id
        exchange = MetricsExchange(replica)
        self._gateway = build_gateway(
            engine,
            settings,
            name=name,
            version=version,
            card=card,
            replica=replica,
            other_metrics=exchange.others,
        )
        limits.on_refusal.append(self._gateway.state.metrics.request)
        exchange.start(self._gateway.state.metrics.page)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Ray Serve runs."""
        return self._gateway


def warm_up(engine: TorchEngine, batch_tokens: int) -> None:
    """Computes the smallest and the largest batch, so that the first requests are as fast as the later ones.

    Raises:
        InputError: the model gives no finite numbers.
    """
    longest = "word " * engine.spec.max_length
    for text, count in (("word", 1), (longest, max(1, batch_tokens // engine.spec.max_length))):
        encoded = engine.encode([text] * count, [text] * count if engine.spec.pair else None)
        if not np.isfinite(engine.forward(encoded)).all():
            raise InputError("the model gives no finite numbers, so its training diverged; finetune it anew.")
