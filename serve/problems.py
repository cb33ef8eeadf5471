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

    def response(self) -> Response:
        """What is sent."""
        return Response(problem(self.status, self.detail), self.status, self.headers, MEDIA_TYPE)


def problem(status: int, detail: str) -> bytes:
    """The body of a problem: type, title, status and detail."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
