"""The routes that are asked all day, without what FastAPI does for each request.

What FastAPI does before and after a handler (matching each route, solving dependencies, exit stacks) takes as long as
all that our handlers do, on the one thread that every request of a replica passes. A route whose handler takes the
request and gives the response needs none of it.
"""

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.problems import ProblemError
from serve.requests import record_of

Handler = Callable[[Request], Awaitable[Response]]


class DirectRoutes:
    """ASGI middleware that answers POSTs to some paths by their handlers; the application documents them all the same.

    Args:
        app: the application.
        handlers: by path; what they raise is answered as the application would.
    """

    def __init__(self, app: ASGIApp, handlers: Mapping[str, Handler]) -> None:
        self._app = app
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        handler = None
        if scope["type"] == "http" and scope["method"] == "POST" and not scope.get("root_path"):
            handler = self._handlers.get(scope["path"])
        if handler is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await handler(Request(scope, receive, send))
        except ProblemError as refused:
            response = refused.response(record_of(scope).id)
        await response(scope, receive, send)
