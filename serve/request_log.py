"""Outermost of all that handles a request: its id, its line in the log, and an answer where the code fails.

Like `serve.security` it stands in two places, before `serve.limits` and around the application, and looks at a request
once; but whatever fails is caught where it is first met, so that neither Ray nor uvicorn writes the exception, whose
message may quote the request, into a log.
"""

import asyncio
import functools
import json
import os
import time
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Literal

from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.access import MODELS, PAGE, STATIC, is_open, plain_path
from serve.forwarding import SHADOW_HEADER
from serve.guard import SETTINGS_VARIABLE
from serve.logs import logger
from serve.problems import failure
from serve.requests import REQUEST_ID_HEADER, RequestRecord, known_record, new_record
from serve.settings import ServeSettings

_LEFT = 499
"""The client has gone before it was answered."""

_TITLES = {each.value: each.phrase for each in HTTPStatus} | {_LEFT: "Client Closed Request"}
_REFUSED = frozenset({401, 403, 429})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"})
_INFO, _WARNING, _ERROR = 20, 30, 40

_OURS = (REQUEST_ID_HEADER, SHADOW_HEADER)

_log = logger("errors")
_lines = logger("requests")
# Its records hold nothing that a client wrote but the id, and to look through them costs as much as to write them.
_lines.filters.clear()


class _BrokenOffError(Exception):
    """An answer that had begun cannot be ended."""


class RequestLines:
    """Writes a line for each request, or for those that went wrong.

    Args:
        which: as `serve.log_requests` says.
    """

    def __init__(self, which: Literal["none", "errors", "all"]) -> None:
        self._none = which == "none"
        self._all = which == "all"
        self._about: dict[str, Any] = {}
        self._paths: frozenset[str] = frozenset()

    def describe(self, routes: Iterable[BaseRoute], *, model: str, version: str, replica: str) -> None:
        """Says who answers here, and by which routes: a path that is none of them is whatever its client wrote."""
        self._about = {"model": model, "version": version, "replica": replica}
        self._paths = frozenset(getattr(route, "path", "") for route in routes)

    def write(self, record: RequestRecord, method: str, path: str, seconds: float) -> None:
        """Writes the line of a request that has ended, if it is one to write."""
        status = record.status or _LEFT
        wrong = status >= 500 or status in _REFUSED
        if self._none or not (wrong or self._all):
            return
        level = _ERROR if status >= 500 else _WARNING if wrong else _INFO
        if not _lines.isEnabledFor(level):
            return
        fields: dict[str, Any] = {
            "request_id": record.id,
            "method": method if method in _METHODS else "(other)",
            "path": self._path(path),
            "status": status,
            "milliseconds": round(seconds * 1000, 2),
            **self._about,
        }
        if status >= 400:
            fields["problem"] = _TITLES.get(status, "Unknown")
        if record.client is not None:
            fields["client"] = record.client
        if record.model is not None:
            fields["model"], fields["version"] = record.model, record.version
        if record.texts is not None:
            fields["texts"], fields["tokens"], fields["truncated"] = record.texts, record.tokens, record.truncated
        if record.queue_s is not None:
            fields["queue_milliseconds"] = round(record.queue_s * 1000, 2)
        message, args = "%s %s %s", (fields["method"], fields["path"], status)
        _lines.handle(_lines.makeRecord(_lines.name, level, "", 0, message, args, None, extra={"fields": fields}))

    def _path(self, path: str) -> str:
        if path.startswith(MODELS):
            path = plain_path(path)
            return f"{MODELS}*{path if path in self._paths else ''}"
        if path in self._paths or is_open("GET", path):
            return next((each for each in (STATIC, PAGE) if path.startswith(each)), path)
        return "(other)"


class RequestLog:
    """ASGI middleware: gives a request its id, answers 500 where the application fails, and writes the request's line.

    Args:
        app: the application.
        lines: writes the lines.
    """

    def __init__(self, app: ASGIApp, lines: RequestLines) -> None:
        self._app = app
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (known := known_record(scope)) is not None:
            await self._answer(known, scope, receive, send)
            return
        started = time.perf_counter()
        scope = dict(scope)
        record = new_record(scope)
        own = (REQUEST_ID_HEADER, record.id.encode("ascii"))
        # Ray, and whoever else comes after, takes the id from the header, and is not to see another one.
        scope["headers"] = [*(each for each in scope["headers"] if each[0] not in _OURS), own]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                others = (each for each in message.get("headers", ()) if each[0].lower() != REQUEST_ID_HEADER)
                message = {**message, "headers": [*others, own]}
            await send(message)

        try:
            await self._answer(record, scope, receive, send_with_id)
        except asyncio.CancelledError:
            record.status = _LEFT
            raise
        finally:
            self._lines.write(record, scope["method"], scope["path"], time.perf_counter() - started)

    async def _answer(self, record: RequestRecord, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            record.status = _LEFT
        except _BrokenOffError:
            raise
        except Exception as error:
            said = "\n".join((scope["path"], scope.get("query_string", b"").decode("latin-1"), *_strings(record.body)))
            _log.error("A request failed.", exc_info=error, extra={"request_id": record.id, "said": said})
            if record.status == HTTPStatus.INTERNAL_SERVER_ERROR:  # The application has said so.
                return
            if record.status is not None:  # It has begun, and all that can be done is to close the connection.
                raise _BrokenOffError("the answer broke off; the log of shoal.errors says why") from None
            await failure().response(record.id)(scope, receive, send)


@functools.cache
def process_lines() -> RequestLines:
    """The one writer of this replica, made as its environment says."""
    return RequestLines(ServeSettings.model_validate_json(os.environ[SETTINGS_VARIABLE]).log_requests)


def _strings(body: bytes) -> Iterable[str]:
    """What a body says: as it was sent, and without the escapes that JSON has for letters."""
    yield body.decode("utf-8", "replace")
    try:
        yield json.dumps(json.loads(body), ensure_ascii=False)
    except (ValueError, RecursionError):
        return
