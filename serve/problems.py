"""Errors as a client sees them: `application/problem+json` (RFC 9457) with one clear sentence."""

import json
from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"


class ProblemError(Exception):
    """A request that is answered with an error: its status and the sentence that says what is wrong."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})
        self.members: dict[str, str] = {}
        """Further members of the body."""

    def response(self) -> Response:
        """What is sent."""
        return Response(problem(self.status, self.detail, self.members), self.status, self.headers, MEDIA_TYPE)


def body_too_large(max_body_bytes: int) -> str:
    """The sentence for a body beyond the limit, which is said in several places."""
    return f"The request's body is larger than {max_body_bytes:,} bytes; send fewer texts at a time."


def problem(status: int, detail: str, members: Mapping[str, str] | None = None) -> bytes:
    """The body of a problem: type, title, status, detail and further members."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    body |= members or {}
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
