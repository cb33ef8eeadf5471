"""The deployment: each replica holds the HTTP face and the engine, so a plain request crosses no second process."""

from functools import partial

from ray import serve as ray_serve
from starlette.types import ASGIApp

from serve import refusals
from serve.exchange import MetricsExchange
from serve.gateway import build_gateway
from serve.guard import process_guard
from serve.model import ServedModel
from serve.scaling import BUSY, QUEUED, REFUSED, REQUESTS, SPEED
from serve.security import Security
from serve.settings import ServeSettings


@ray_serve.deployment
@ray_serve.ingress()
class Classifier:
    """One replica: loads the classifier, warms it up, and answers.

    Ray calls it ready, and sends it requests, only after its constructor.
    """

    def __init__(self, settings: ServeSettings, model: ServedModel) -> None:
        engine = model.load(settings)
        replica = ray_serve.get_replica_context().replica_id.unique_id
        exchange = MetricsExchange(replica)
        self._gateway = build_gateway(
            engine,
            settings,
            name=model.name,
            version=model.version,
            card=model.card,
            thresholds=model.thresholds,
            reference=model.reference,
            replica=replica,
            other_metrics=exchange.others,
            explainer=partial(model.load_explainer, settings),
        )
        self._gateway.add_middleware(Security, guard=process_guard())
        # By its module: Ray ships this class by value, and with it copies of what it names directly.
        refusals.on_refusal.append(self._gateway.state.metrics.request)
        exchange.start(self._gateway.state.metrics.page)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What autoscaling goes by; Ray asks for it every moment."""
        load = self._gateway.state.batcher.load()
        return {
            QUEUED: load.queued_tokens,
            SPEED: load.tokens_per_second,
            BUSY: load.busy,
            REFUSED: load.refused_per_second,
            REQUESTS: load.requests,
        }

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Ray Serve runs."""
        return self._gateway
