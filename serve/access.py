"""Which request asks for which scope, and what is known of whoever asks."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from serve.problems import ProblemError

Scope = Literal["classify", "explain", "metrics", "admin"]
"""What a key or token allows; `admin` allows all."""

SCOPES: tuple[Scope, ...] = get_args(Scope)

STATIC = "/static-offline-docs/"
"""Where the files of the documentation's page are."""

PAGE = "/page/"
"""Where the files of the page for people are; the page itself is `GET /`."""

_OPEN = frozenset({"/healthz", "/health", "/-/healthz", "/-/routes", "/docs", "/openapi.json"})
"""Health and documentation; the two with a hyphen are Ray Serve's, by which HAProxy learns whether a replica lives."""

_SCOPES: dict[str, Scope] = {
    "/": "classify",
    "/v1/classify": "classify",
    "/predict": "classify",
    "/v1/explain": "explain",
    "/metrics": "metrics",
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever has shown a valid key or token."""

    identity: str
    """Names it in this process: requests of the same identity share a rate."""
    scopes: frozenset[str]
    expires: float = math.inf
    """Seconds since the epoch."""
    rate: float | None = None
    """Requests a second of its own, in place of the endpoint's."""

    def may(self, scope: Scope | None) -> bool:
        """Whether its scopes allow what asks for `scope`."""
        return scope is None or scope in self.scopes or "admin" in self.scopes


MODELS = "/models/"
"""Before the name of another model in a path; what follows it asks for the same scope as it does without."""


def plain_path(path: str) -> str:
    """The path without the name of another model."""
    if not path.startswith(MODELS):
        return path
    _, slash, rest = path[len(MODELS) :].partition("/")
    return slash + rest


def is_open(method: str, path: str) -> bool:
    """Whether anyone may ask so: for health, documentation and the page for people, which asks for a key itself."""
    if path.startswith(MODELS):
        if method not in ("GET", "HEAD"):
            return False
        path = plain_path(path)
    if path == "/":  # `POST /` classifies.
        return method in ("GET", "HEAD")
    return path in _OPEN or path.startswith((STATIC, PAGE))


def scope_of(path: str) -> Scope | None:
    """The scope that a path which is not open asks for; None where any valid key will do, as for unknown paths."""
    return _SCOPES.get(plain_path(path))


def unauthorized(sentence: str, error: str = "") -> ProblemError:
    """401 as RFC 6750 has it; `error` is for whoever showed something."""
    return ProblemError(401, sentence, {"WWW-Authenticate": f'Bearer error="{error}"' if error else "Bearer"})
