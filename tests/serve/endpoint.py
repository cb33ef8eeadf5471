"""The gateway in a plain uvicorn, and raw HTTP to it: what clients get, without waiting for a cluster."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from models.engine import Engine
from serve.gateway import build_gateway
from serve.guard import Guard
from serve.limits import RequestLimits
from serve.request_log import RequestLines, RequestLog
from serve.security import Security
from serve.settings import ServeSettings


@contextlib.contextmanager
def running(engine: Engine, settings: ServeSettings, guard: Guard | None = None, **about: Any) -> Iterator[str]:
    """The URL of an endpoint that answers for `engine` while the block runs, as a replica does."""
    about = {"name": "small", "version": "f00d", "replica": "local", **about}
    gateway = build_gateway(engine, settings, **about)
    lines = RequestLines(settings.log_requests)
    lines.describe(gateway.routes, model=about["name"], version=about["version"], replica=about["replica"])
    inner = RequestLog(Security(gateway, guard), lines)
    app = RequestLog(Security(RequestLimits(inner, settings.max_body_bytes, settings.body_timeout_s), guard), lines)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def raw(url: str, request: bytes, *rest: tuple[float, bytes], timeout: float = 20) -> tuple[int, dict[str, str], bytes]:
    """Sends bytes as they are (`rest`: further ones after pauses) and reads one response: status, headers, body."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        connection.sendall(request)
        for pause, part in rest:
            time.sleep(pause)
            with contextlib.suppress(OSError):  # the answer may have come, and the connection be closed
                connection.sendall(part)
        answer = b""
        while b"\r\n\r\n" not in answer:
            if not (part := connection.recv(65536)):
                raise ConnectionError(f"no response but {answer!r}")
            answer += part
        head, body = answer.split(b"\r\n\r\n", 1)
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        while len(body) < int(headers.get("content-length", 0)):
            body += connection.recv(65536)
        return int(lines[0].split()[1]), headers, body


def post(body: bytes, *headers: str, path: str = "/v1/classify", length: int | None = None) -> bytes:
    """The bytes of a POST request."""
    lines = [f"POST {path} HTTP/1.1", "Host: shoal", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


def problem_of(response: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    """Status and sentence of an error, which must be a whole problem+json with one sentence."""
    status, headers, body = response
    assert headers["content-type"] == "application/problem+json", (status, body)
    problem = json.loads(body)
    assert problem["status"] == status
    assert problem["title"]
    detail = problem["detail"]
    assert isinstance(detail, str)
    assert detail.endswith(".")
    assert "\n" not in detail
    assert len(detail) < 400
    return status, detail
