"""A version that a process holds ready: its engine behind its HTTP face."""

import gc
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import fastapi.dependencies.models

from serve.direct import DirectApp
from serve.gateway import build_gateway
from serve.guard import process_store
from serve.model import ServedModel
from serve.request_log import RequestLines
from serve.sampling import make_sampler
from serve.scaling import BUSY, QUEUED, REFUSED, REQUESTS, SPEED
from serve.settings import ServeSettings
from serve.shedding import sheds_at_front


def free_dropped() -> None:
    """Gives back the memory of versions that nobody holds any more; stops the process for some tenths of a second.

    FastAPI remembers every route function it has seen, and with it all that the function uses; Ray exempts from
    Python's collector what a replica's constructor has made.
    """
    for each in vars(fastapi.dependencies.models).values():
        if hasattr(each, "cache_clear"):
            each.cache_clear()
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class Loaded:
    """One version, warmed up. To drop it is enough: what is under way is answered still, and then its threads end.

    Raises:
        InputError: a file is missing, damaged or not the registered one, or the model gives no finite numbers.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: ServeSettings,
        replica: str,
        other_metrics: Callable[[], Awaitable[Iterable[str]]] | None = None,
    ) -> None:
        self.model = model
        engine = model.load(settings)
        own = (model.name, model.version, replica)
        self._sampler = make_sampler(settings.sample, process_store(), engine.spec, own, settings.redact)
        self._replica = replica
        self.gateway: DirectApp = build_gateway(
            engine,
            settings,
            name=model.name,
            version=model.version,
            card=model.card,
            thresholds=model.thresholds,
            reference=model.reference,
            replica=replica,
            other_metrics=other_metrics,
            explainer=None if model.members else partial(model.load_explainer, settings),
            sampler=self._sampler,
            sheds_at_front=sheds_at_front(),
        )

    def describe(self, lines: RequestLines) -> None:
        """Lets the lines of requests say who answers, and by which routes."""
        lines.describe(self.gateway.routes, model=self.model.name, version=self.model.version, replica=self._replica)

    def close(self) -> None:
        """Writes the samples that wait, and takes no more."""
        if self._sampler is not None:
            self._sampler.close()

    def page(self) -> str:
        """Its metrics, as Prometheus reads them."""
        page: str = self.gateway.state.metrics.page()
        return page

    def count_shed(self, requests: int) -> None:
        """Counts requests that HAProxy refused in this replica's stead."""
        self.gateway.state.metrics.shed(requests)
        self.gateway.state.batcher.workload.refused(requests)

    def load(self) -> dict[str, float]:
        """What there was to do since the last call, for autoscaling."""
        load = self.gateway.state.batcher.load()
        return {
            QUEUED: load.queued_tokens,
            SPEED: load.tokens_per_second,
            BUSY: load.busy,
            REFUSED: load.refused_per_second,
            REQUESTS: load.requests,
        }
