"""Requests that another process answers: a request and its response as plain data, and an application asked by them."""

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SHADOW_HEADER = b"x-shoal-shadow"
"""Of a copy of a request, whose answer nobody gets."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, whole."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """A response, whole."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    async def send(self, send: Send) -> None:
        """Gives it to a client."""
        await send({"type": "http.response.start", "status": self.status, "headers": list(self.headers)})
        await send({"type": "http.response.body", "body": self.body})


async def body_of(receive: Receive) -> bytes | None:
    """The whole body; None when the client has gone."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def replaying(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first, then what comes (the disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def asked_of(scope: Scope, body: bytes, path: str | None = None) -> Asked:
    """The request of a scope, at another path where one is given."""
    return Asked(scope["method"], path or scope["path"], scope["query_string"], tuple(scope["headers"]), body)


async def reply_of(app: ASGIApp, asked: Asked, more: Mapping[str, object] | None = None) -> Reply:
    """What the application answers. `more`: of the scope it came with."""
    scope: Scope = {
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "server": None,
        "client": None,
        "root_path": "",
        **(more or {}),
        "type": "http",
        "method": asked.method,
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "query_string": asked.query,
        "headers": list(asked.headers),
    }
    pending: list[Message] = [{"type": "http.request", "body": asked.body, "more_body": False}]
    found: dict[str, Message] = {}
    parts: list[bytes] = []

    async def receive() -> Message:
        return pending.pop() if pending else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            found["start"] = message
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    start = found["start"]
    return Reply(start["status"], tuple((bytes(n), bytes(v)) for n, v in start["headers"]), b"".join(parts))
