"""What processes of the endpoint leave for each other: pages in the cluster's own key-value store.

Each replica writes its metrics page every `INTERVAL_S` seconds; a page that is older than `LIFETIME_S` is of a replica
that has gone, and is removed by whoever sees it. One small write for each replica and interval, whatever the load.
"""

import asyncio
import json
import threading
import time
from collections.abc import Callable

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from serve.logs import logger

INTERVAL_S = 2.0
LIFETIME_S = 15.0
_NAMESPACE = "shoal-metrics"

_log = logger("metrics")


class Exchange:
    """One page of a namespace: what one process leaves there."""

    def __init__(self, namespace: str, key: str) -> None:
        self._namespace = namespace
        self._key = key.encode()

    def put(self, page: str) -> None:
        """Leaves a page that stays until it is replaced or removed."""
        _internal_kv_put(self._key, page.encode(), overwrite=True, namespace=self._namespace)

    def get(self) -> str | None:
        """The page that was put, or None."""
        value = _internal_kv_get(self._key, namespace=self._namespace)
        return value.decode() if value else None

    def publish(self, page: str) -> None:
        """Leaves a page that is of no use `LIFETIME_S` later."""
        self.put(json.dumps({"at": time.time(), "page": page}))

    def remove(self) -> None:
        """Takes the page away."""
        _internal_kv_del(self._key, namespace=self._namespace)


def latest(namespace: str, lifetime_s: float = LIFETIME_S) -> dict[str, str]:
    """The pages that processes have published in the last `lifetime_s`, by key."""
    pages = {}
    for key in sorted(_internal_kv_list(b"", namespace=namespace)):
        value = _internal_kv_get(key, namespace=namespace)
        if not value:
            continue
        entry = json.loads(value)
        age = time.time() - entry["at"]
        if age <= lifetime_s:
            pages[key.decode()] = entry["page"]
        elif age > LIFETIME_S:
            _internal_kv_del(key, namespace=namespace)
    return pages


class MetricsExchange:
    """One replica's metrics page among those of the others."""

    def __init__(self, replica: str) -> None:
        self._key = replica
        self._exchange = Exchange(_NAMESPACE, replica)

    def start(self, page: Callable[[], str]) -> None:
        """Publishes `page()` from now on, in a thread that ends with the process."""
        threading.Thread(target=self._publish, args=(page,), name="metrics", daemon=True).start()

    async def others(self) -> list[str]:
        """The latest pages of the other replicas that are alive."""
        pages = await asyncio.to_thread(latest, _NAMESPACE)
        return [page for key, page in pages.items() if key != self._key]

    def _publish(self, page: Callable[[], str]) -> None:
        while True:
            try:
                self._exchange.publish(page())
            except Exception:  # the head may be away for a while; the next round tries again
                _log.warning("cannot publish metrics", exc_info=True)
            time.sleep(INTERVAL_S)
