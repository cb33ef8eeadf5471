"""The deployment: each replica holds the HTTP face and the engine, so a plain request crosses no second process."""

import asyncio
from typing import Any

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve import refusals, shedding
from serve.direct import Announced
from serve.exchange import MetricsExchange
from serve.forwarding import Asked, Reply
from serve.front import Front
from serve.guard import process_guard
from serve.loaded import Loaded
from serve.logs import log_into_replica_file
from serve.request_log import RequestLog, process_lines
from serve.security import Security
from serve.settings import ServeSettings
from serve.traffic import Reports, Table, read_table
from serve.versions import version_handle


@ray_serve.deployment
@ray_serve.ingress()
class Classifier:
    """One replica: loads the version that the table names, warms it up, and answers.

    Ray calls it ready, and sends it requests, only after its constructor.
    """

    def __init__(self, settings: ServeSettings) -> None:
        log_into_replica_file()
        replica = ray_serve.get_replica_context().replica_id.unique_id
        exchange = MetricsExchange(replica)
        self._handles: dict[str, DeploymentHandle[Any]] = {}

        def load(table: Table) -> Loaded:
            loaded = Loaded(table.served, settings, replica, exchange.others)
            loaded.describe(process_lines())
            return loaded

        table = read_table()
        assert table is not None, "the table is written before there are replicas"
        self._front = Front(table, load(table), load, self._ask)
        # By its module: Ray ships this class by value, and with it copies of what it names directly.
        refusals.on_refusal.append(lambda *refusal: self._front.loaded.gateway.state.metrics.request(*refusal))
        shedding.on_shed.append(lambda requests: self._front.loaded.count_shed(requests))
        exchange.start(lambda: self._front.loaded.page())
        self._front.follow(Reports(replica))

    async def _ask(self, identity: str, asked: Asked) -> Reply:
        if identity not in self._handles:
            self._handles[identity] = version_handle(identity)
        response = self._handles[identity].remote(asked)
        try:
            reply: Reply = await response
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]
            # Nobody waits for it any more, so nobody needs to compute it.
            raise
        return reply

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What autoscaling goes by; Ray asks for it every moment."""
        return self._front.load()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Ray Serve runs."""
        return Announced(RequestLog(Security(self._front, process_guard()), process_lines()))
