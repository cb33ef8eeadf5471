"""Outermost of all that handles a request: whether it is let in, and the headers that tell browsers what to refuse.

It stands in two places. Before `serve.limits` it refuses a request before its body is read. Around the application it
takes what came another way: where no replica seems to live, Ray Serve's HAProxy sends requests to a proxy of Ray's own,
which hands them to a replica behind the replica's HTTP server. A request is looked at once.
"""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.access import STATIC
from serve.guard import CREDENTIALS, Guard
from serve.problems import ProblemError
from serve.refusals import refuse

_ADMITTED = "shoal.admitted"
"""In the scope of a request that was let in; no client can put it there."""

STRICT_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": STRICT_POLICY,
    "Cache-Control": "no-store",
}
"""Of every answer that does not bring its own; files of the documentation may be kept, so they lack the last."""

_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
_STATIC_HEADERS = _HEADERS[:-1]


class Security:
    """ASGI middleware: a guard before the application, and headers on whatever is answered.

    Args:
        app: the application.
        guard: lets requests in or refuses them; None lets all in.
    """

    def __init__(self, app: ASGIApp, guard: Guard | None = None) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] == "websocket":  # There is none here, and what is not there needs no guard.
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or _ADMITTED in scope:
            await self._app(scope, receive, send)
            return
        usual = _STATIC_HEADERS if scope["path"].startswith(STATIC) else _HEADERS

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = message.get("headers", [])
                names = {name for name, _ in own}
                message = {**message, "headers": [*own, *(each for each in usual if each[0] not in names)]}
            await send(message)

        headers = scope["headers"]
        if self._guard is not None:
            started = time.perf_counter()
            try:
                await self._guard.admit(scope)
            except ProblemError as refused:
                await refuse(refused, started, scope, receive, send_with_headers)
                return
            # Nobody behind this needs them, and what is not there is in no log.
            headers = [each for each in headers if each[0] not in CREDENTIALS]
        await self._app({**scope, "headers": headers, _ADMITTED: True}, receive, send_with_headers)
