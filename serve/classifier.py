"""The deployment: each replica holds the HTTP face and the engine, so a plain request crosses no second process."""

from ray import serve as ray_serve
from starlette.types import ASGIApp

from serve.exchange import MetricsExchange
from serve.gateway import build_gateway
from serve.guard import process_guard
from serve.model import ServedModel
from serve.refusals import on_refusal
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
            replica=replica,
            other_metrics=exchange.others,
        )
        self._gateway.add_middleware(Security, guard=process_guard())
        on_refusal.append(self._gateway.state.metrics.request)
        exchange.start(self._gateway.state.metrics.page)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Ray Serve runs."""
        return self._gateway
