"""Where replicas leave their metrics pages for each other: the cluster's own key-value store.

Each replica writes its page every `INTERVAL_S` seconds; a page that is older than `LIFETIME_S` is of a replica that
has gone, and is removed by whoever sees it. One small write for each replica and interval, whatever the load.
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


class MetricsExchange:
    """One replica's part in it."""

    def __init__(self, replica: str) -> None:
        self._key = replica.encode()

    def start(self, page: Callable[[], str]) -> None:
        """Publishes `page()` from now on, in a thread that ends with the process."""
        threading.Thread(target=self._publish, args=(page,), name="metrics", daemon=True).start()

    async def others(self) -> list[str]:
        """The latest pages of the other replicas that are alive."""
        return await asyncio.to_thread(self._read)

    def _publish(self, page: Callable[[], str]) -> None:
        while True:
            entry = json.dumps({"at": time.time(), "page": page()})
            try:
                _internal_kv_put(self._key, entry.encode(), overwrite=True, namespace=_NAMESPACE)
            except Exception:  # the head may be away for a while; the next round tries again
                _log.warning("cannot publish metrics", exc_info=True)
            time.sleep(INTERVAL_S)

    def _read(self) -> list[str]:
        pages = []
        for key in sorted(_internal_kv_list(b"", namespace=_NAMESPACE)):
            value = _internal_kv_get(key, namespace=_NAMESPACE) if key != self._key else None
            if not value:
                continue
            entry = json.loads(value)
            if time.time() - entry["at"] <= LIFETIME_S:
                pages.append(entry["page"])
            else:
                _internal_kv_del(key, namespace=_NAMESPACE)
        return pages
