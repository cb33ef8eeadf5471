"""Refusing in HAProxy what every replica would refuse.

To refuse a request costs a replica a good part of what it costs to compute a short text, and under ten times the load
there are nine to refuse for each to compute. So a replica whose queue is full, and will be for a while, says so in the
429 that it answers. While all of them have said so within the last moment, HAProxy refuses by itself, with what they
said of when to come again; it is so short a moment that no queue gets empty meanwhile. What HAProxy refused it tells
with the next request that it lets through, so that it is counted like all else and more replicas are started for it.

HAProxy keeps both in stick tables: in one, the servers that are full, each for the moment; in the other, a counter of
what it refused.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.dialects import with_error_members
from serve.problems import MEDIA_TYPE, ProblemError, problem

VARIABLE = "SHOAL_SHEDS_AT_FRONT"
"""In a replica's environment: before it stands an HAProxy that sheds. Others would let a client say what was shed."""

FULL = "X-Shoal-Full"
"""A replica's header: its queue will be full for more than the moment."""

SHED = "X-Shoal-Shed"
"""HAProxy's header: how many requests it has refused since it last told."""

SHARED_PATHS = frozenset({"/v1/classify", "/predict", "/"})
"""What goes through the replicas' queues, and what a candidate may answer in the place of the stable version."""

on_shed: list[Callable[[int], None]] = []
"""Told how many requests HAProxy refused."""

_SHORT_BYTES = 65_536
_SHED = SHED.lower().encode()
_LONGEST_MOMENT_S = 1.0
_SHARE_OF_QUEUE = 0.25
"""Of a full queue, what may be worked off while HAProxy refuses."""
_LINE = "    "


def moment_s(max_wait_s: float) -> float:
    """For how long HAProxy refuses after a replica did, where a full queue holds `max_wait_s`."""
    return min(_LONGEST_MOMENT_S, max_wait_s * _SHARE_OF_QUEUE)


def sheds_at_front() -> bool:
    """Whether this process is a replica behind an HAProxy that sheds."""
    return bool(os.environ.get(VARIABLE))


def shed_of(scope: Scope) -> int:
    """How many requests HAProxy tells that it has refused."""
    told = next((value for name, value in scope["headers"] if name == _SHED), b"")
    return int(told) if told.isdigit() and len(told) < 10 else 0


class ShedCounter:
    """ASGI middleware: hands on what HAProxy tells, whatever becomes of the request that it is told with."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] == "http" and (shed := shed_of(scope)):
            for tell in on_shed:
                tell(shed)
        await self._app(scope, receive, send)


def is_lasting(wait_s: float, max_wait_s: float) -> bool:
    """Whether a queue in which one waits `wait_s` loses little while HAProxy refuses in its stead."""
    return wait_s >= 2 * moment_s(max_wait_s)


def backend_lines(folder: Path) -> list[str]:
    """What HAProxy does with the requests to the replicas; writes its pages into `folder`."""
    asks = f"if METH_POST {{ path {' '.join(sorted(SHARED_PATHS))} }}"
    # A large body is on its way while the answer is: closed upon, its client would see a broken connection.
    short = f"{{ req.hdr_val(content-length) gt 0 }} {{ req.hdr_val(content-length) le {_SHORT_BYTES} }}"
    refused = "if { var(txn.shed) -m bool }"
    plain, other = folder / "429.json", folder / "429-other.json"
    refusal = ProblemError(429, "Too many requests wait; try again in %[var(proc.shoal_retry)] s.")
    told = {"request_id": "%[var(txn.id)]"}
    plain.write_bytes(problem(429, refusal.detail, told))
    other.write_bytes(problem(429, refusal.detail, {**with_error_members(refusal).members, **told}))
    head = f"http-request return status 429 content-type {MEDIA_TYPE}"
    headers = "hdr Retry-After %[var(proc.shoal_retry)] hdr X-Request-Id %[var(txn.id)]"
    return [
        "http-request set-var(txn.servers) nbsrv",
        f"http-request set-var(txn.asks) bool(true) {asks}",
        "http-request track-sc0 str(all) table shoal_shed if { var(txn.asks) -m bool }",
        f"http-request set-var(txn.shed) bool(true) if {{ var(txn.asks) -m bool }} {short} "
        "{ var(txn.servers) -m int gt 0 } { var(proc.shoal_retry) -m found } "
        "{ table_cnt(shoal_full),sub(txn.servers) ge 0 }",
        f"http-request sc-inc-gpc0(0) {refused}",
        f"http-request set-var(txn.id) uuid() {refused}",
        f"http-request set-var(txn.id) req.hdr(X-Request-Id) {refused} "
        "{ req.hdr(X-Request-Id) -m reg ^[A-Za-z0-9._-]{1,64}$ }",
        f"http-request set-log-level silent {refused}",
        f"{head} lf-file {quoted(str(plain))} {headers} {refused} {{ path /v1/classify }}",
        f"{head} lf-file {quoted(str(other))} {headers} {refused}",
        f"http-request del-header {SHED}",
        f"http-request set-header {SHED} %[sc0_clr_gpc0] if {{ sc0_get_gpc0 gt 0 }}",
        f"http-response track-sc1 srv_name table shoal_full if {{ res.hdr({FULL}) -m found }}",
        f"http-response set-var(proc.shoal_retry) res.hdr(Retry-After) if {{ res.hdr({FULL}) -m found }}",
        f"http-response del-header {FULL}",
    ]


def tables(max_wait_s: float) -> list[str]:
    """The end of the configuration."""
    return [
        "backend shoal_full",
        f"{_LINE}stick-table type string len 128 size 1k expire {max(1, round(moment_s(max_wait_s) * 1000))}ms",
        "backend shoal_shed",
        f"{_LINE}stick-table type string len 8 size 1 store gpc0",
    ]


def quoted(word: str) -> str:
    """One word of HAProxy's configuration."""
    return '"' + re.sub(r'(["\\$])', r"\\\1", word) + '"'
