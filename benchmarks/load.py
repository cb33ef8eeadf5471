"""Open-loop load over HTTP/1.1: a request is sent when it is due, however many are still unanswered.

Latencies count from when a request was due, so that a server that falls behind cannot hide it (no coordinated
omission). Run as a process of its own; prints JSON:

    python benchmarks/load.py http://127.0.0.1:8000/v1/classify bodies.jsonl --rate 200 --seconds 10
"""

import argparse
import asyncio
import collections
import gc
import json
import random
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Outcome:
    """What came of a load: an entry for each request, in the order of their answers."""

    due: list[float] = field(default_factory=list)
    """Seconds after the start."""
    latency: list[float] = field(default_factory=list)
    """Seconds from then to the answer."""
    status: list[int] = field(default_factory=list)
    """0 where the connection was lost or the answer did not come in time."""
    connections: int = 0
    lag: float = 0.0
    """The longest that this process itself was late to send, in seconds."""

    def summary(self, seconds: float) -> dict[str, Any]:
        """Requests answered with 200 per second, their latencies, and how many had which status."""
        good = np.array([each for each, status in zip(self.latency, self.status, strict=True) if status == 200])
        return {
            "answered_per_second": len(good) / seconds,
            "p50_ms": float(np.percentile(good, 50) * 1e3) if len(good) else None,
            "p99_ms": float(np.percentile(good, 99) * 1e3) if len(good) else None,
            "statuses": {str(key): value for key, value in sorted(collections.Counter(self.status).items())},
            "connections": self.connections,
            "lag_ms": self.lag * 1e3,
        }


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on its way."""

    def __init__(self, load: "_Load") -> None:
        self._load = load
        self._answer = bytearray()
        self._wanted = -1
        self._status = 0
        self._due = 0.0
        self._chunked = False
        self._busy = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, request: bytes, due: float) -> None:
        """Sends a request that was due at `due`."""
        assert self._transport is not None
        self._due, self._busy, self._wanted = due, True, -1
        self._answer.clear()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self._wanted < 0:
            end = self._answer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._answer[:end]).lower()
            self._status = int(head[9:12])
            start = head.find(b"content-length:")
            length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            self._wanted = end + 4 + length
            self._chunked = b"transfer-encoding: chunked" in head
            self._closing = b"connection: close" in head
        whole = self._answer.endswith(b"0\r\n\r\n") if self._chunked else len(self._answer) >= self._wanted
        if whole:
            self._busy = False
            self._load.answered(self._due, self._status, None if self._closing else self)

    def connection_lost(self, error: Exception | None) -> None:
        self._load.lost(self)
        if self._busy:
            self._busy = False
            self._load.answered(self._due, 0, None)


class _Load:
    def __init__(self, url: str, bodies: list[bytes], rate: float, seconds: float, seed: int) -> None:
        parts = urllib.parse.urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        head = f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self._requests = [f"{head}Content-Length: {len(each)}\r\n\r\n".encode() + each for each in bodies]
        self._rate, self._seconds = rate, seconds
        self._draw = random.Random(seed)
        self._idle: list[_Connection] = []
        self._missing = 0
        self._over = asyncio.Event()
        self._opening: set[asyncio.Task[None]] = set()
        self.outcome = Outcome()

    def answered(self, due: float, status: int, connection: _Connection | None) -> None:
        """Notes an answer; the connection is free again."""
        self.outcome.due.append(due - self._start)
        self.outcome.latency.append(time.perf_counter() - due)
        self.outcome.status.append(status)
        if connection is not None:
            self._idle.append(connection)
        self._missing -= 1
        if self._missing == 0:
            self._over.set()

    def lost(self, connection: _Connection) -> None:
        """A connection that ended is used no more."""
        if connection in self._idle:
            self._idle.remove(connection)

    async def run(self, patience: float) -> Outcome:
        loop = asyncio.get_running_loop()
        self._start = due = time.perf_counter() + 0.1
        number = 0
        self._missing = 1
        while True:
            due += self._draw.expovariate(self._rate)
            if due > self._start + self._seconds:
                break
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            else:
                self.outcome.lag = max(self.outcome.lag, -wait)
                if number % 32 == 0:
                    await asyncio.sleep(0)
            self._missing += 1
            request = self._requests[number % len(self._requests)]
            number += 1
            if self._idle:
                self._idle.pop().send(request, due)
            else:
                task = loop.create_task(self._on_new_connection(request, due))
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)
        self._missing -= 1
        if self._missing:
            try:
                await asyncio.wait_for(self._over.wait(), patience)
            except TimeoutError:
                self.outcome.due += [0.0] * self._missing
                self.outcome.latency += [float("inf")] * self._missing
                self.outcome.status += [0] * self._missing
        return self.outcome

    async def _on_new_connection(self, request: bytes, due: float) -> None:
        self.outcome.connections += 1
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self), self._host, self._port
            )
        except OSError:
            self.answered(due, 0, None)
            return
        connection.send(request, due)


def open_loop(
    url: str, bodies: list[bytes], rate: float, seconds: float, *, seed: int = 0, patience: float = 30.0
) -> Outcome:
    """Sends requests with exponential gaps, `rate` a second on average, and waits `patience` s for late answers."""
    gc.disable()
    return asyncio.run(_started(url, bodies, rate, seconds, seed, patience))


async def _started(url: str, bodies: list[bytes], rate: float, seconds: float, seed: int, patience: float) -> Outcome:
    return await _Load(url, bodies, rate, seconds, seed).run(patience)


def main() -> None:
    """Loads one URL and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("bodies", type=Path, help="A JSON document a line, sent in turn.")
    parser.add_argument("--rate", type=float, required=True, help="Requests a second.")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="Write every request's due, latency and status here.")
    given = parser.parse_args()
    bodies = given.bodies.read_bytes().splitlines()
    outcome = open_loop(given.url, bodies, given.rate, given.seconds, seed=given.seed)
    if given.trace:
        rows = zip(outcome.due, outcome.latency, outcome.status, strict=True)
        given.trace.write_text(json.dumps([list(row) for row in rows]), encoding="utf-8")
    print(json.dumps(outcome.summary(given.seconds)))


if __name__ == "__main__":
    main()
