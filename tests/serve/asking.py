"""A client that asks at a steady rate, whatever becomes of its requests, and asks again when its connection is lost."""

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx


@dataclass
class Asked:
    """What came of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    """How many were answered with which status in the end; 0: the connection was lost twice."""
    retried: int = 0
    slowest_s: float = 0.0


@contextlib.contextmanager
def asking(
    url: str, per_second: float = 20.0, pause_s: float = 0.0, tries: int = 2, unavailable: bool = False
) -> Iterator[Asked]:
    """Sends requests while the block runs, each when it is due, and awaits the answers to all of them at its end.

    Args:
        url: the endpoint's.
        per_second: requests.
        pause_s: the seconds after which a request whose connection was lost is sent again.
        unavailable: one that was answered 503 is sent again, too.
        tries: how often it is sent at most.
    """
    asked, done = Asked(), threading.Event()

    async def ask(client: httpx.AsyncClient) -> None:
        started = time.monotonic()
        status = 0
        for number in range(tries):
            if number:
                asked.retried += 1
                await asyncio.sleep(pause_s)
            with contextlib.suppress(httpx.TransportError):
                status = (await client.post("/v1/classify", json={"texts": ["late"]})).status_code
                if status != 503 or not unavailable:
                    break
        asked.statuses[status] += 1
        asked.slowest_s = max(asked.slowest_s, time.monotonic() - started)

    async def run() -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client, asyncio.TaskGroup() as group:
            due = time.monotonic()
            while not done.is_set():
                group.create_task(ask(client))
                due += 1 / per_second
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        yield asked
    finally:
        done.set()
        thread.join()
