"""Errors as a client sees them: `application/problem+json` (RFC 9457) with one clear sentence."""

import json
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from serve.requests import record_of

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

    def response(self, request_id: str) -> Response:
        """What is sent."""
        members = {**self.members, "request_id": request_id}
        return Response(problem(self.status, self.detail, members), self.status, self.headers, MEDIA_TYPE)


def body_too_large(max_body_bytes: int) -> str:
    """The sentence for a body beyond the limit, which is said in several places."""
    return f"The request's body is larger than {max_body_bytes:,} bytes; send fewer texts at a time."


def failure() -> ProblemError:
    """What is answered where the code fails."""
    return ProblemError(500, "The server failed at this request; its log says why.")


def problem(status: int, detail: str, members: Mapping[str, str] | None = None) -> bytes:
    """The body of a problem: type, title, status, detail and further members."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    body |= members or {}
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def answer_problems(app: FastAPI) -> None:
    """Has an application answer its refusals, and what it has no route for, as problems."""

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        return error.response(record_of(request.scope).id)

    async def refuse_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.scope["path"][:80]
        sentence = {
            404: f"There is nothing at {path}; /docs tells what there is.",
            405: f"{request.method[:20]} is not allowed at {path}; see /docs.",
        }.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        if error.status_code == 405:  # Starlette tells the methods of one route of several at the path.
            routes = [each for each in app.routes if isinstance(each, Route) and each.path == request.scope["path"]]
            headers["Allow"] = ", ".join(sorted({method for each in routes for method in each.methods or ()}))
        return ProblemError(error.status_code, sentence, headers).response(record_of(request.scope).id)

    async def fail(request: Request, error: Exception) -> Response:
        return failure().response(record_of(request.scope).id)  # The error itself goes on to `serve.request_log`.

    app.add_exception_handler(Exception, fail)
    app.add_exception_handler(ProblemError, refuse)
    app.add_exception_handler(HTTPException, refuse_route)
