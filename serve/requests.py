"""What is known of a request while it is handled: its id, who asks, and what its line in the log will tell.

It goes with the request in its ASGI scope, from the outermost middleware to the route and back.
"""

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.types import Scope

REQUEST_ID_HEADER = b"x-request-id"
_KEY = "shoal.request"
"""In the scope; no client can put it there."""

_VISIBLE = re.compile(rb"[!-~]{1,128}")


@dataclass(slots=True)
class RequestRecord:
    """One request. None of it is text to classify, but the body, which no log is given."""

    id: str
    client: str | None = None
    """The caller's key id or token subject."""
    status: int | None = None
    """Of the response, once that has begun."""
    model: str | None = None
    """What has answered, and its version."""
    version: str | None = None
    texts: int | None = None
    tokens: int | None = None
    truncated: int | None = None
    """How many of the texts."""
    queue_s: float | None = None
    body: bytes = b""

    def answered_by(self, model: str, version: str, *, texts: int, tokens: int, truncated: int) -> None:
        """Notes what the model has read."""
        self.model, self.version = model, version
        self.texts, self.tokens, self.truncated = texts, tokens, truncated


def new_record(scope: Scope) -> RequestRecord:
    """The record of a request that has none, put into its scope; its id is the client's where that is a proper one."""
    record = scope[_KEY] = RequestRecord(_request_id(scope["headers"]))
    return record


def known_record(scope: Scope) -> RequestRecord | None:
    """The record of a request, if it has one."""
    found: RequestRecord | None = scope.get(_KEY)
    return found


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request; a new one where no middleware has made it."""
    return known_record(scope) or new_record(scope)


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if name == REQUEST_ID_HEADER:
            if _VISIBLE.fullmatch(value):
                return value.decode("ascii")
            break
    return uuid.uuid4().hex
