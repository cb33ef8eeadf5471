"""The documentation that the endpoint serves: its page, which needs no other host, and which keys its routes need."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.responses import HTMLResponse

from serve.access import STATIC, is_open, scope_of
from serve.problems import MEDIA_TYPE
from serve.security_settings import ExposureSettings

_POLICY = (
    "default-src 'none'; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What Swagger UI needs. Its one script in the page is named by its hash; its icons are in its style sheet."""


def serve_documentation(app: FastAPI) -> None:
    """Adds the page `/docs`, with a policy that lets the browser run these scripts and no others."""
    # A validator elsewhere would be shown the address of the document.
    parameters = {"validatorUrl": None}
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=app.title,
        swagger_js_url=f"{STATIC}swagger-ui-bundle.js",
        swagger_css_url=f"{STATIC}swagger-ui.css",
        swagger_favicon_url=f"{STATIC}favicon.png",
        swagger_ui_parameters=parameters,
    )
    scripts = re.findall(rb"<script>(.*?)</script>", page.body, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(each).digest()).decode() for each in scripts]
    headers = {"Content-Security-Policy": _POLICY.format(hashes=" ".join(f"'sha256-{each}'" for each in digests))}

    files = StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static")
    app.mount(STATIC.rstrip("/"), files, name="documentation")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page.body, headers=headers)


def declare_security(app: FastAPI, settings: ExposureSettings) -> None:
    """Lets the OpenAPI document say which keys or tokens are taken, and which routes need which."""
    schemes = _schemes(settings)
    if not schemes:
        return
    plain = app.openapi

    def document() -> dict[str, Any]:
        found = plain()
        found.setdefault("components", {})["securitySchemes"] = schemes
        for path, methods in found["paths"].items():
            wanted = scope_of(path)
            for method, operation in methods.items():
                if is_open(method.upper(), path):
                    continue
                operation["security"] = [{name: []} for name in schemes]
                told = {401: "No valid key or token.", **({403: f"It lacks the scope {wanted}."} if wanted else {})}
                for status, sentence in told.items():
                    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
                    operation["responses"][str(status)] = {"description": sentence, "content": content}
        return found

    app.openapi = document  # type: ignore[method-assign]


def _schemes(settings: ExposureSettings) -> dict[str, Any]:
    schemes: dict[str, Any] = {}
    if settings.guarded:
        kinds = [
            *(["an API key"] if settings.accepts_keys else []),
            *([f"a token of {settings.jwt.issuer}"] if settings.jwt else []),
        ]
        schemes["bearer"] = {"type": "http", "scheme": "bearer", "description": f"It is {' or '.join(kinds)}."}
    if settings.accepts_keys:
        schemes["apiKey"] = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    return schemes
