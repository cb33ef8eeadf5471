"""The endpoint's page for people: `GET /` and the files that it is made of.

It knows no more than any client does and asks the same routes, so it needs no state and no scope of its own: where keys
are demanded, whoever opens it is asked for one.
"""

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response

from serve.access import PAGE

FOLDER = Path(__file__).parent / "page"

INDEX = "index.html"

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Its own files and its own endpoint, nothing else; the last two make browsers refuse to read any text as HTML."""


def serve_page(app: FastAPI) -> None:
    """Adds the page and its files, which are read here, once."""
    for file in sorted(FOLDER.iterdir()):
        _serve_file(app, "/" if file.name == INDEX else f"{PAGE}{file.name}", file)


def _serve_file(app: FastAPI, path: str, file: Path) -> None:
    content = file.read_bytes()
    # Of the content alone, so that all replicas agree; browsers ask each time whether it is still the same.
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache", "ETag": etag}

    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def answer(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=MEDIA_TYPES[file.suffix])
