"""What a request's id and its line in the log cost it.

    python benchmarks/request_log.py      # some seconds

The middleware around an application that answers at once, called as a server calls it, in turns: without it, with no
lines, and with a line for each request, written to a file as Ray Serve's replicas write theirs. The medians of several
rounds, in microseconds of processor time (of user and system).
"""

import asyncio
import logging
import statistics
import tempfile
import time
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path

from machine import describe_machine
from rich.console import Console
from rich.table import Table
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.logs import log_into_replica_file
from serve.request_log import RequestLines, RequestLog
from serve.requests import known_record

REQUESTS = 5_000
ROUNDS = 9
HEADERS = [(b"host", b"shoal"), (b"content-type", b"application/json"), (b"content-length", b"42")]
OUTER = {"type": "http", "method": "POST", "path": "/v1/classify", "query_string": b"", "headers": HEADERS}


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers at once, and notes what a model would."""
    if (record := known_record(scope)) is not None:
        record.client, record.queue_s = "key 1f0c2a9d", 0.0012
        record.answered_by("airline", "3fb1c2a9d07e4c55", texts=1, tokens=28, truncated=0)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b"{}"})


async def receive() -> Message:
    """Nothing comes."""
    return {"type": "http.disconnect"}


async def send(_: Message) -> None:
    """It goes nowhere."""


async def microseconds(app: ASGIApp) -> float:
    """Of one request."""
    started = time.process_time()
    for _ in range(REQUESTS):
        await app(dict(OUTER), receive, send)
    return (time.process_time() - started) / REQUESTS * 1e6


def twice(lines: RequestLines) -> ASGIApp:
    """The application with the middleware in both its places."""
    return RequestLog(RequestLog(answer, lines), lines)


def main() -> None:
    """Measures, and prints the table."""
    ray = logging.getLogger("ray.serve")
    with tempfile.TemporaryDirectory() as folder:
        target = RotatingFileHandler(Path(folder) / "replica.log", maxBytes=2**29, backupCount=1)
        ray.handlers, ray.propagate = [MemoryHandler(1, target=target)], False
        log_into_replica_file()
        contestants: dict[str, ASGIApp] = {"without": answer}
        for which in ("none", "errors", "all"):
            lines = RequestLines(which)
            lines.describe([], model="airline", version="3fb1c2a9d07e4c55", replica="f8i93k2a")
            contestants[f"log_requests: {which}"] = twice(lines)
        rounds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, app in contestants.items():
                rounds[name].append(asyncio.run(microseconds(app)))
    found = {name: statistics.median(each) for name, each in rounds.items()}
    table = Table("one request", "us", "more than without", title=describe_machine())
    for name, each in found.items():
        table.add_row(name, f"{each:.1f}", f"{each - found['without']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
