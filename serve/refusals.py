"""Answering a request that the application never sees, and telling whoever counts such answers."""

import time
from collections.abc import Callable

from starlette.types import Receive, Scope, Send

from serve.problems import ProblemError
from serve.requests import record_of

on_refusal: list[Callable[[int, float], None]] = []
"""Whoever wants to hear of this process's refusals: called with the status and the seconds it took. Ray makes the
middleware by itself, apart from the application, so there is no other way from one to the other."""


async def refuse(refused: ProblemError, started: float, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the refusal of a request that came at `started` (of `time.perf_counter`)."""
    if any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"]):
        # What is left of the body is not read, so the connection cannot be used for another request.
        refused.headers["connection"] = "close"
    for tell in on_refusal:
        tell(refused.status, time.perf_counter() - started)
    await refused.response(record_of(scope).id)(scope, receive, send)
