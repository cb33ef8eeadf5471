"""What a client may do before its request reaches the application: how much it sends, and how slowly.

This stands outside of Ray's own request handling, which would read a body of any size into memory, count a
client that sends slowly as a request in progress (and start replicas for it), and fail on header values that
are not UTF-8.
"""

import asyncio
import os
import time

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.direct import PastRay
from serve.forwarding import replaying
from serve.guard import SETTINGS_VARIABLE, process_guard
from serve.problems import ProblemError, body_too_large
from serve.refusals import refuse
from serve.request_log import RequestLog, process_lines
from serve.security import Security
from serve.settings import ServeSettings
from serve.shedding import ShedCounter, sheds_at_front

# Headers by which any client could change how Ray handles its request.
_RAY_CONTROLS = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}


class RequestLimits:
    """ASGI middleware that hands on requests with their whole body, or refuses them.

    Holds at most `max_body_bytes` and one chunk of a request. Answers 413 as soon as more is announced or
    comes, 408 when the body is not there after `body_timeout_s`, 400 for a Content-Length that is no number.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": _clean(scope["headers"])}
        headers = dict(scope["headers"])
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        try:
            body = await self._read(headers.get(b"content-length"), receive)
        except ProblemError as refused:
            await refuse(refused, started, scope, receive, send)
            return
        if body is not None:
            await self._app(scope, replaying(body, receive), send)

    async def _read(self, announced: bytes | None, receive: Receive) -> bytes | None:
        """The body; None when the client has gone."""
        if announced is not None:
            if not announced.isdigit():
                raise ProblemError(400, "The Content-Length header must be a number of bytes.")
            if len(announced) > 18 or int(announced) > self._max_body_bytes:
                raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            sentence = f"The request's body was not complete after {self._body_timeout_s:g} s; send it faster."
            raise ProblemError(408, sentence) from None

    def _too_large(self) -> ProblemError:
        return ProblemError(413, body_too_large(self._max_body_bytes))


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around each replica's HTTP server (it is given this function's import path); the last is
    outermost."""
    settings = ServeSettings.model_validate_json(os.environ[SETTINGS_VARIABLE])
    around = [
        Middleware(PastRay),
        Middleware(RequestLimits, max_body_bytes=settings.max_body_bytes, body_timeout_s=settings.body_timeout_s),
        Middleware(Security, guard=process_guard()),
        Middleware(RequestLog, lines=process_lines()),
    ]
    return [*around, Middleware(ShedCounter)] if sheds_at_front() else around


def _clean(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers without Ray's controls, every value valid UTF-8."""
    return [(name, _as_utf8(value)) for name, value in headers if name not in _RAY_CONTROLS]


def _as_utf8(value: bytes) -> bytes:
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value
