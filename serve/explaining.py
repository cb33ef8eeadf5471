"""`POST /v1/explain`: which words of a text speak for a label, one explanation at a time beside everything else.

An explanation costs some dozens of answers (`models.explaining`), so it has a thread and a small queue of its own.
torch and the classifier in it are loaded there at the first one: a replica that answers by ONNX Runtime has neither
before.
"""

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse, Response

from models.labels import find_class
from models.settings import InputError
from models.spec import ClassifierSpec
from serve.problems import ProblemError
from serve.requests import record_of
from serve.schemas import shape_problem

if TYPE_CHECKING:
    from models.explaining import Explainer, Explanation

LoadExplainer = Callable[[], "Explainer"]

_MAX_RETRY_S = 60


class ExplainRequest(BaseModel):
    """A text, and the label that its words are to be held against."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str = Field(description="The text.", examples=["The flight was late again."])
    pair: str | None = Field(None, description="Its partner, for a model of pairs.")
    column: str | None = Field(None, description="The label column; may be left out where the model has only one.")
    label: str | None = Field(None, description="One of the column's classes; by default the likeliest.")


class ExplainedWord(BaseModel):
    """A word and what it brought."""

    text: str
    source: Literal["text", "pair"] = Field(description="Which of the two texts it is of.")
    start: int = Field(description="Its first character in that text, as it is told in the answer.")
    end: int = Field(description="The character after its last.")
    attribution: float = Field(description="What it brought to the label's logit; below 0, what it took.")


class ExplainResponse(BaseModel):
    """What each word brought to the label's logit."""

    model: str = Field(description="The model's name.")
    version: str = Field(description="The fingerprint of the model's artifact.")
    text: str = Field(
        description="The text as the model reads it: cleaned, and masked where that is set. Words' places are in it."
    )
    pair: str | None = Field(description="Its partner as the model reads it.")
    column: str
    label: str
    probability: float = Field(description="The label's calibrated probability.")
    words: list[ExplainedWord] = Field(description="In their order, as far as the model reads.")
    total: float = Field(description="The sum of all attributions.")
    difference: float = Field(description="The label's logit for the text less that for a text of padding.")
    error: float = Field(description="How far the total is from the difference, which it should be.")
    relative_error: float = Field(description="The error over the difference (over 0.02, where that is less).")
    steps: int = Field(description="Of the numerical integral.")
    truncated: bool = Field(description="Whether the text was longer than the model reads; its end was not seen.")
    tokens: int = Field(description="Tokens that the model read, special tokens included.")


class Answered(Protocol):
    """As the gateway answers and counts a request."""

    def __call__(
        self, request: Request, answer: Callable[[bytes, float | None], Awaitable[Response]], *, explanation: bool
    ) -> Awaitable[Response]:
        """The answer to a request's body."""


class Explanations:
    """Explanations, one after the other in a thread of their own.

    Args:
        load: loads the explainer; called in that thread, until it succeeds once.
        waiting: how many may wait while one is computed.
    """

    def __init__(self, load: LoadExplainer, waiting: int) -> None:
        self._load = load
        self._explainer: Explainer | None = None
        self._places = threading.BoundedSemaphore(waiting + 1)
        self._most = waiting + 1
        self._thread = ThreadPoolExecutor(1, "explain")
        self._seconds = 1.0

    async def explain(self, asked: ExplainRequest) -> "Explanation":
        """The explanation; cancel it to give up: it is then not begun, or ended before the next batch.

        Raises:
            ProblemError: 429, too many wait; 422, it cannot be given for this request; 501, for any of this model.
        """
        if not self._places.acquire(blocking=False):
            seconds = min(_MAX_RETRY_S, max(1, math.ceil(self._seconds * self._most)))
            raise ProblemError(
                429, f"Too many explanations wait; try again in {seconds} s.", {"Retry-After": str(seconds)}
            )
        gone = threading.Event()
        future = self._thread.submit(self._explain, asked, gone)
        # Not when its client goes: until it has ended, it is in the others' way.
        future.add_done_callback(self._give_place)
        try:
            return await asyncio.wrap_future(future)
        finally:
            gone.set()

    def _give_place(self, _: "Future[Explanation]") -> None:
        self._places.release()

    def _explain(self, asked: ExplainRequest, gone: threading.Event) -> "Explanation":
        def end_if_gone() -> None:
            if gone.is_set():
                raise CancelledError

        if self._explainer is None:
            self._explainer = self._load()
        from models.explaining import UnexplainableError  # which imports torch, as loading has

        started = time.perf_counter()
        try:
            explanation = self._explainer.explain(**asked.model_dump(), before_batch=end_if_gone)
        except UnexplainableError as error:
            raise ProblemError(501, str(error)) from None
        except InputError as error:
            raise ProblemError(422, str(error)) from None
        self._seconds = 0.8 * self._seconds + 0.2 * (time.perf_counter() - started)
        return explanation


def add_explain_route(
    app: FastAPI,
    explanations: Explanations,
    spec: ClassifierSpec,
    about: Mapping[str, str],
    answered: Answered,
    problems: dict[int | str, dict[str, Any]],
) -> None:
    """Adds the route to an application.

    Args:
        app: the application.
        explanations: what explains.
        spec: the model's.
        about: the model's name and version, as they stand in an answer.
        answered: answers a request and counts it.
        problems: the errors of a route, for the OpenAPI document.
    """
    schema = ExplainRequest.model_json_schema()

    @app.post(
        "/v1/explain",
        summary="Explain which words of a text speak for a label",
        response_model=ExplainResponse,
        responses=problems,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    )
    async def explain(request: Request) -> Response:
        async def answer(body: bytes, _timeout_s: float | None) -> Response:
            explanation = await explanations.explain(parse(body, spec))
            record_of(request.scope).answered_by(
                **about, texts=1, tokens=explanation.tokens, truncated=int(explanation.truncated)
            )
            return JSONResponse({**about, **as_json(explanation)})

        return await answered(request, answer, explanation=True)


def parse(body: bytes, spec: ClassifierSpec) -> ExplainRequest:
    """The request, as far as it can be told right without computing anything.

    Raises:
        ProblemError: 400 where the body cannot be read as JSON in UTF-8; 422 where it has another shape, asks for
            what the model does not have, or says nothing.
    """
    wanted = '{"text": "...", "pair": "..."}' if spec.pair else '{"text": "..."}'
    try:
        asked = ExplainRequest.model_validate_json(body)
        find_class(spec.labels, asked.column, asked.label)
    except ValidationError as error:
        raise shape_problem(error.errors(include_url=False)[0], wanted, "a string") from None
    except InputError as error:
        raise ProblemError(422, str(error)) from None
    if spec.pair and asked.pair is None:
        raise ProblemError(422, f"The field pair is missing, since the model takes pairs of texts; send {wanted}.")
    if not spec.pair and asked.pair is not None:
        raise ProblemError(422, "pair must be left out, since the model takes single texts.")
    for name, text in (("text", asked.text), ("pair", asked.pair)):
        if text is not None and not text.strip():
            raise ProblemError(422, f"{name} is empty; give it some text.")
    return asked


def as_json(explanation: "Explanation") -> dict[str, Any]:
    """The explanation in plain JSON types, its numbers rounded to six digits."""
    return {name: _rounded(value) for name, value in asdict(explanation).items()}


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return round(value, 6)
        case dict():
            return {name: _rounded(each) for name, each in value.items()}
        case tuple():
            return [_rounded(each) for each in value]
    return value
