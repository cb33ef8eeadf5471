"""The routes that are asked all day, without what FastAPI and Ray Serve do for each request.

A replica has one thread for all its requests, beside those that compute, and what it does for a request there is what
limits how many short texts a replica answers. FastAPI's middleware and routing, its solving of dependencies and its
exit stacks take as long as all that our handlers do; Ray Serve's own handling (a request's context, its metrics, three
tasks, a queue of its messages) takes as long again. A request to one of these routes is in need of none of it: it is
counted, logged, bounded, cancelled and drained by what stands here and around.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.problems import ProblemError
from serve.requests import record_of
from serve.shedding import SHARED_PATHS

Handler = Callable[[Request], Awaitable[Response]]

ready: dict[asyncio.AbstractEventLoop, ASGIApp] = {}
"""By the event loop that runs it, the application of this process that takes requests past Ray's handling. Ray makes
the middleware by itself, apart from the application, so there is no other way from one to the other."""


class DirectApp(FastAPI):
    """FastAPI application that answers POSTs to some paths by their handlers, and documents them all the same.

    Its own middleware (`add_middleware`) does not see those; what is to see all requests stands around it.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._handlers: Mapping[str, Handler] = {}

    def answer_directly(self, handlers: Mapping[str, Handler]) -> None:
        """By path, what takes a request and gives the response; what they raise is answered as by the application."""
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        handler = None
        if scope["type"] == "http" and scope["method"] == "POST" and not scope.get("root_path"):
            handler = self._handlers.get(scope["path"])
        if handler is None:
            await super().__call__(scope, receive, send)
            return
        try:
            response = await handler(Request(scope, receive, send))
        except ProblemError as refused:
            response = refused.response(record_of(scope).id)
        await response(scope, receive, send)


class Announced:
    """ASGI application that is `ready` from the beginning to the end of its lifespan, in the event loop that it has.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request, or the lifespan."""
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        ready[loop] = self._app
        try:
            await self._app(scope, receive, send)
        finally:
            ready.pop(loop, None)


class PastRay:
    """ASGI middleware, innermost before Ray's handling: hands requests to the queue to the application that is `ready`.

    Where none is in this event loop, as on a cluster whose replicas run their code in a thread of its own, and for all
    else that may be asked, Ray goes on. When a replica stops, the HTTP server itself lets what is under way end.

    Args:
        app: Ray's handling. A request's first message has its whole body (`serve.limits`).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request.

        Raises:
            ClientDisconnect: the client went before it was answered; the application was cancelled.
        """
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in SHARED_PATHS:
            app = ready.get(asyncio.get_running_loop())
            if app is not None:
                await _unless_left(app, scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _unless_left(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Runs the application until it or its client ends. Its answer's last message is the last that it awaits."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    task = asyncio.current_task()
    assert task is not None
    left = asyncio.ensure_future(receive())
    pending = [message]
    cancelled = False

    def cancel(_: "asyncio.Future[Message]") -> None:
        nonlocal cancelled
        if left.cancelled() or (left.exception() is None and left.result()["type"] != "http.disconnect"):
            return
        cancelled = True
        task.cancel()

    async def replay() -> Message:
        return pending.pop() if pending else await asyncio.shield(left)

    left.add_done_callback(cancel)
    try:
        await app(scope, replay, send)
    except asyncio.CancelledError:
        if cancelled and not task.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        left.remove_done_callback(cancel)
        left.cancel()
