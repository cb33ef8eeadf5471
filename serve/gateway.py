"""The HTTP face: routes, their documentation, and every error as one clear sentence.

The same application runs in a Ray Serve replica and, in tests, in a plain uvicorn. It holds no state but the
classifier that it is made for.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from models.engine import Encoded, TorchEngine
from serve.batching import Batcher, QueueFullError
from serve.metrics import ServeMetrics, merged
from serve.problems import MEDIA_TYPE, ProblemError
from serve.schemas import ClassifyResponse, Problem, RequestShape, answers_as_json
from serve.settings import ServeSettings

_INLINE_CHARACTERS = 1024
"""Up to here tokenising takes less time than handing the texts to a thread and back."""

_SLICE_CHARACTERS = 16384
"""About what is tokenised of one request before it is another's turn: some 20 ms. Single texts above it have a thread
of their own, so that only their like wait for them."""

_STATUSES = {
    400: "The body cannot be read as JSON in UTF-8.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is compressed.",
    422: "The body has another shape than is asked for.",
    429: "Too many requests wait; `Retry-After` says when to come again.",
}


def build_gateway(
    engine: TorchEngine,
    settings: ServeSettings,
    *,
    name: str,
    version: str,
    card: dict[str, Any] | None = None,
    replica: str = "local",
    other_metrics: Callable[[], Awaitable[Iterable[str]]] | None = None,
) -> FastAPI:
    """The application that answers for one loaded classifier.

    Args:
        engine: the classifier.
        settings: limits and batch size.
        name: the model's name.
        version: the fingerprint of its artifact.
        card: what `/v1/model` tells besides (metrics, lineage).
        replica: names this process in the metrics.
        other_metrics: the metrics pages of the replicas beside this one.
    """
    batcher = Batcher(engine.forward, settings.batch_tokens, settings.max_queued, engine.max_padding)
    metrics = ServeMetrics(name, version, replica, lambda: batcher.queued)
    batcher.report = metrics.batch
    shape = RequestShape.of(pair=engine.spec.pair, max_texts=settings.max_texts)
    about = _finite({**(card or {}), **_about(engine, name, version)})
    app = FastAPIOffline(
        title=f"Shoal: {name}",
        version=version,
        description="Classifies texts. Errors are `application/problem+json` with one sentence in `detail`.",
        redoc_url=None,
        redirect_slashes=False,
    )
    _answer_errors(app)

    encoder, long_encoder = ThreadPoolExecutor(1, "encode"), ThreadPoolExecutor(1, "encode-long")

    async def encode(texts: Sequence[str], pairs: Sequence[str] | None) -> list[Encoded]:
        lengths = [len(text) for text in texts]
        if pairs is not None:
            lengths = [length + len(pair) for length, pair in zip(lengths, pairs, strict=True)]
        if sum(lengths) <= _INLINE_CHARACTERS:
            return engine.encode(texts, pairs)
        encoded: list[Encoded] = []
        for part in _slices(lengths):
            partners = None if pairs is None else pairs[part]
            thread = encoder if sum(lengths[part]) <= _SLICE_CHARACTERS else long_encoder
            work = asyncio.get_running_loop().run_in_executor(thread, engine.encode, texts[part], partners)
            encoded += await work  # a client that has gone is noticed here
        return encoded

    async def classify(request: Request) -> Response:
        codings = ",".join(request.headers.getlist("content-encoding")).split(",")
        if {coding.strip().lower() for coding in codings} - {"", "identity"}:
            raise ProblemError(415, "The request's body must not be compressed; leave out Content-Encoding.")
        try:
            with batcher.place():
                texts, pairs = shape.parse(await request.body())
                encoded = await encode(texts, pairs)
                logits = await batcher.submit(encoded)
        except QueueFullError as full:
            retry = {"Retry-After": str(full.retry_after_s)}
            raise ProblemError(429, f"Too many requests wait; try again in {full.retry_after_s} s.", retry) from None
        metrics.classified(len(encoded), sum(item.truncated for item in encoded))
        results = answers_as_json(engine.answers(encoded, logits))
        return JSONResponse({"model": name, "version": version, "results": results})

    @app.post(
        "/v1/classify",
        summary="Classify texts",
        response_model=ClassifyResponse,
        responses={
            status: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": text}
            for status, text in _STATUSES.items()
        },
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": shape.json_schema()}}}
        },
    )
    async def classify_and_count(request: Request) -> Response:
        started = time.perf_counter()
        status = 500
        try:
            response = await classify(request)
            status = response.status_code
        except ProblemError as error:
            status = error.status
            raise
        except asyncio.CancelledError:
            status = 499  # the client has gone
            raise
        finally:
            metrics.request(status, time.perf_counter() - started)
        return response

    @app.get("/v1/model", summary="What model answers: its labels, metrics and lineage")
    async def model() -> Response:
        return JSONResponse(about)

    @app.get("/healthz", summary="Whether this replica can answer")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", summary="Counters for Prometheus", response_class=PlainTextResponse)
    async def metrics_page() -> Response:
        others = await other_metrics() if other_metrics else ()
        return PlainTextResponse(merged([metrics.page(), *others]), media_type="text/plain; version=0.0.4")

    app.state.batcher = batcher
    app.state.metrics = metrics
    return app


def _slices(lengths: Sequence[int]) -> Iterator[slice]:
    """The texts in turn: as many at a time as `_SLICE_CHARACTERS` hold, one at least."""
    start, size = 0, 0
    for index, length in enumerate(lengths):
        if index > start and size + length > _SLICE_CHARACTERS:
            yield slice(start, index)
            start, size = index, 0
        size += length
    yield slice(start, len(lengths))


def _about(engine: TorchEngine, name: str, version: str) -> dict[str, Any]:
    return {
        "name": name,
        "version": version,
        "labels": [column.model_dump(mode="json") for column in engine.spec.labels],
        "max_length": engine.spec.max_length,
        "pair": engine.spec.pair,
        "precision": engine.precision,
        "device": str(engine.device),
    }


def _finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value


def _answer_errors(app: FastAPI) -> None:
    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        return error.response()

    async def refuse_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.scope["path"][:80]
        sentence = {
            404: f"There is nothing at {path}; /docs tells what there is.",
            405: f"{request.method[:20]} is not allowed at {path}; see /docs.",
        }.get(error.status_code, str(error.detail))
        return ProblemError(error.status_code, sentence, error.headers).response()

    async def fail(_: Request, error: Exception) -> Response:
        return ProblemError(500, "The server failed at this request; its log says why.").response()

    app.add_exception_handler(ProblemError, refuse)
    app.add_exception_handler(HTTPException, refuse_route)
    app.add_exception_handler(Exception, fail)
