"""The HTTP face: routes, their documentation, and every error as one clear sentence.

The same application runs in a Ray Serve replica and, in tests, in a plain uvicorn. It holds no state but the
classifier that it is made for.
"""

import asyncio
import importlib.metadata
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import JSONResponse, PlainTextResponse, Response

from models.engine import Engine
from serve import dialects
from serve.answering import Answerer, Outputs
from serve.dialects import InferenceRequest, PredictRequest, Score
from serve.direct import DirectApp
from serve.documentation import declare_security, serve_documentation
from serve.drift import DriftMonitor
from serve.explaining import Explanations, LoadExplainer, add_explain_route
from serve.forwarding import SHADOW_HEADER
from serve.metrics import ServeMetrics, merged
from serve.openapi import body_of, problems_of
from serve.problems import ProblemError, answer_problems, body_too_large
from serve.requests import record_of
from serve.sampling import Sampler
from serve.schemas import ClassifyResponse, RequestShape, answers_as_json
from serve.settings import ServeSettings
from serve.webpage import serve_page

Asked = TypeVar("Asked", bound=BaseModel)

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
"""How long the client waits: a request that cannot be answered by then is refused at once."""

_SHADOW = SHADOW_HEADER.decode()

_STATUSES = {
    400: "The body cannot be read as JSON in UTF-8.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is compressed.",
    422: "The body has another shape than is asked for.",
    429: "Too many requests wait; `Retry-After` says when to come again.",
}


def build_gateway(
    engine: Engine,
    settings: ServeSettings,
    *,
    name: str,
    version: str,
    card: dict[str, Any] | None = None,
    thresholds: Mapping[str, float] | None = None,
    reference: Mapping[str, Any] | None = None,
    replica: str = "local",
    other_metrics: Callable[[], Awaitable[Iterable[str]]] | None = None,
    explainer: LoadExplainer | None = None,
    sampler: Sampler | None = None,
    sheds_at_front: bool = False,
) -> DirectApp:
    """The application that answers for one loaded classifier.

    Args:
        engine: the classifier.
        settings: limits and batch size.
        name: the model's name.
        version: the fingerprint of its artifact.
        card: what `/v1/model` tells besides (metrics, lineage).
        thresholds: by label column, the calibrated probability below which no class is answered.
        reference: what `evaluate` found of texts and answers (`models.drift.Reference`), to tell drift by.
        replica: names this process in the metrics.
        other_metrics: the metrics pages of the replicas beside this one.
        explainer: loads what explains the answers, at the first explanation; without it there are none.
        sampler: is offered every request that was classified, but copies of one.
        sheds_at_front: before it stands an HAProxy that refuses in its stead (`serve.shedding`).

    Raises:
        InputError: the reference is damaged, or another classifier's.
    """
    release = importlib.metadata.version("shoal")
    metrics = ServeMetrics(
        name,
        version,
        replica,
        lambda: answerer.batcher.queued,
        queued_tokens=lambda: answerer.batcher.workload.queued_tokens,
        min_replicas=settings.min_replicas,
        build={"release": release, "engine": engine.name, "precision": engine.precision, "device": engine.device},
    )
    drift = DriftMonitor(engine, settings.drift, (name, version, replica), reference)
    metrics.register(drift)
    if sampler is not None:
        metrics.register(sampler)
    answerer = Answerer(engine, settings, metrics, drift, thresholds or {}, sheds_at_front=sheds_at_front)
    shape = RequestShape.of(pair=engine.spec.pair, max_texts=settings.max_texts)
    about = _finite({**(card or {}), **_about(engine, name, version)})
    app = DirectApp(
        title=f"Shoal: {name}",
        version=version,
        description="Classifies texts. Errors are `application/problem+json` with one sentence in `detail`.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    answer_problems(app)
    serve_documentation(app)
    serve_page(app)
    declare_security(app, settings)

    async def answered(
        request: Request,
        answer: Callable[[bytes, float | None], Awaitable[Response]],
        *,
        explanation: bool = False,
    ) -> Response:
        """The answer to a request's body, counted; it has its place in the queue before the body is looked at."""
        started = time.perf_counter()
        status = 500
        try:
            _refuse_compressed(request)
            timeout_s = _timeout(request)
            with answerer.place(timeout_s):
                body = record_of(request.scope).body = await request.body()
                if len(body) > settings.max_body_bytes:  # It came another way than by `serve.limits`.
                    raise ProblemError(413, body_too_large(settings.max_body_bytes))
                response = await answer(body, timeout_s)
            status = response.status_code
        except ProblemError as error:
            status = error.status
            raise
        except asyncio.CancelledError:
            status = 499  # the client has gone
            raise
        finally:
            if _SHADOW not in request.headers:
                metrics.request(status, time.perf_counter() - started, explanation=explanation)
        return response

    async def computed(request: Request, texts: list[str], pairs: list[str] | None, timeout_s: float | None) -> Outputs:
        outputs = await answerer.compute(texts, pairs, timeout_s)
        record = record_of(request.scope)
        record.queue_s = outputs.waited_s
        tokens, truncated = sum(answer.tokens for answer in outputs.answers), sum(outputs.truncated)
        record.answered_by(name, version, texts=len(texts), tokens=tokens, truncated=truncated)
        if sampler is not None and _SHADOW not in request.headers:
            sampler.offer(record.id, texts, pairs, outputs.answers)
        return outputs

    @app.post(
        "/v1/classify",
        summary="Classify texts",
        response_model=ClassifyResponse,
        responses=problems_of(_STATUSES),
        openapi_extra=body_of(shape.json_schema()),
    )
    async def classify(request: Request) -> Response:
        async def answer(body: bytes, timeout_s: float | None) -> Response:
            outputs = await computed(request, *shape.parse(body), timeout_s)
            results = answers_as_json(outputs.answers)
            said = to_json({"model": name, "version": version, "results": results})
            return Response(said, media_type="application/json")

        return await answered(request, answer)

    async def scored(request: Request, kind: type[Asked], answer: Callable[[Asked, Outputs, bool], Any]) -> Response:
        """The answer to a request in another server's shape."""

        async def respond(body: bytes, timeout_s: float | None) -> Response:
            asked = dialects.parse(kind, body)
            texts, pairs, single = dialects.texts_of(asked.inputs, pair=engine.spec.pair, max_texts=settings.max_texts)
            return JSONResponse(answer(asked, await computed(request, texts, pairs, timeout_s), single))

        try:
            return await answered(request, respond)
        except ProblemError as error:
            raise dialects.with_error_members(error) from None

    @app.post(
        "/predict",
        summary="Classify texts, in the shape of text-embeddings-inference",
        response_model=list[Score] | list[list[Score]],
        responses=problems_of(_STATUSES),
        openapi_extra=body_of(PredictRequest.model_json_schema()),
    )
    async def predict(request: Request) -> Response:
        def answer(asked: PredictRequest, outputs: Outputs, single: bool) -> Any:
            if asked.truncate is False:
                dialects.refuse_truncated(outputs.truncated, engine.spec.max_length)
            found = dialects.scores(engine, outputs.logits, "none" if asked.raw_scores else None)
            return found[0] if single else found

        return await scored(request, PredictRequest, answer)

    @app.post(
        "/",
        summary="Classify texts, in the shape of Hugging Face's inference",
        response_model=list[list[Score]],
        responses=problems_of(_STATUSES),
        openapi_extra=body_of(InferenceRequest.model_json_schema()),
    )
    async def infer(request: Request) -> Response:
        def answer(asked: InferenceRequest, outputs: Outputs, single: bool) -> Any:
            wanted = asked.parameters
            return dialects.scores(engine, outputs.logits, wanted.function_to_apply, wanted.top_k)

        return await scored(request, InferenceRequest, answer)

    if explainer is not None and settings.explain:
        explanations = Explanations(explainer, settings.explain_queue)
        problems = problems_of({**_STATUSES, 501: "The model is of a kind that cannot be explained."})
        add_explain_route(app, explanations, engine.spec, {"model": name, "version": version}, answered, problems)

    @app.get("/info", summary="The model, in the shape of text-embeddings-inference")
    async def info() -> Response:
        return JSONResponse(dialects.information(engine, settings, name, version, release))

    @app.get("/health", summary="Whether this replica can answer", response_class=Response)
    async def health() -> Response:
        return Response()

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

    app.answer_directly({"/v1/classify": classify, "/predict": predict, "/": infer})
    app.state.batcher = answerer.batcher
    app.state.metrics = metrics
    return app


def _timeout(request: Request) -> float | None:
    """The seconds that the client waits for its answer, where it says so."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and 0 < len(given) < 10 and int(given)):
        raise ProblemError(400, f"The header {TIMEOUT_HEADER} must be a whole number of milliseconds, 1 or more.")
    return int(given) / 1000


def _refuse_compressed(request: Request) -> None:
    codings = ",".join(request.headers.getlist("content-encoding")).split(",")
    if {coding.strip().lower() for coding in codings} - {"", "identity"}:
        raise ProblemError(415, "The request's body must not be compressed; leave out Content-Encoding.")


def _about(engine: Engine, name: str, version: str) -> dict[str, Any]:
    return {
        "name": name,
        "version": version,
        "labels": [column.model_dump(mode="json") for column in engine.spec.labels],
        "max_length": engine.spec.max_length,
        "pair": engine.spec.pair,
        "engine": engine.name,
        "precision": engine.precision,
        "device": engine.device,
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
