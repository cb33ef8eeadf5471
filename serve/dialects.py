"""The shapes that other servers' clients speak: text-embeddings-inference's and Hugging Face's.

Both give a text's classes as a list of {label, score}, the likeliest first; `POST /predict` as text-embeddings-
inference (TEI) has it, `POST /` as `huggingface_hub.InferenceClient(model=URL).text_classification` expects it. Where a
classifier has several label columns, a class is called COLUMN/CLASS. Errors have TEI's `error` and `error_type` beside
the members of problem+json.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.special import expit, softmax

from models.engine import Engine, FloatArray
from models.labels import spans
from models.spec import class_names
from serve.problems import ProblemError
from serve.settings import ServeSettings

Inputs = str | list[str] | list[list[str]]
Apply = Literal["softmax", "sigmoid", "none"]

_ERROR_TYPES = {413: "validation", 422: "validation", 424: "backend", 429: "overloaded"}


class Score(BaseModel):
    """A class and how likely it is."""

    score: float
    label: str


class PredictRequest(BaseModel):
    """As TEI's `/predict` takes it."""

    model_config = ConfigDict(strict=True)

    inputs: Inputs = Field(
        description="A text; a list of texts, or of lists of one text each. For a model of pairs: a pair, or a list of "
        "pairs.",
        examples=["The flight was late again."],
    )
    raw_scores: bool = Field(False, description="The model's outputs as they are, not as probabilities.")
    truncate: bool | None = Field(
        None, description="Whether longer texts are cut to what the model reads; if false, they are refused."
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] = Field(
        "Right", description="Where longer texts are cut; only right is served."
    )


class Parameters(BaseModel):
    """How Hugging Face's shape asks for its answer."""

    model_config = ConfigDict(strict=True)

    top_k: int | None = Field(None, ge=1, description="How many classes at most.")
    function_to_apply: Apply | None = Field(
        None, description="To the model's outputs; by default what the model was trained with."
    )


class InferenceRequest(BaseModel):
    """As Hugging Face's inference takes it."""

    model_config = ConfigDict(strict=True)

    inputs: Inputs = Field(description="A text or a list of texts.", examples=["The flight was late again."])
    parameters: Parameters = Parameters()


def parse(kind: type[BaseModel], body: bytes) -> Any:
    """The request.

    Raises:
        ProblemError: 400 where the body cannot be read as JSON in UTF-8, 422 where it has another shape.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        if found["type"] == "json_invalid" and "hex escape" not in found["msg"]:
            raise ProblemError(400, "The request's body cannot be read as JSON in UTF-8.") from None
        if found["loc"][:1] == ("inputs",) and found["type"] != "missing":
            sentence = "inputs must be a text, a list of texts, or a list of lists of texts."
        else:
            where = ".".join(str(part) for part in found["loc"])[:80] or "The request's body"
            sentence = f"{where}: {found['msg'][:200].rstrip('.')}."
        raise ProblemError(422, sentence) from None


def texts_of(inputs: Inputs, *, pair: bool, max_texts: int) -> tuple[list[str], list[str] | None, bool]:
    """The texts, their partners, and whether there was one only, not a list.

    Raises:
        ProblemError: 422 where they are not what the model takes; 413 where they are too many.
    """
    single = isinstance(inputs, str) or (pair and bool(inputs) and isinstance(inputs[0], str))
    items: list[Any] = [inputs] if single else list(inputs)
    wanted = "pairs of texts" if pair else "single texts"
    rows = [[item] if isinstance(item, str) else item for item in items]
    if not rows:
        raise ProblemError(422, "inputs is empty; send at least one text.")
    if len(rows) > max_texts:
        raise ProblemError(413, f"inputs holds {len(rows)} texts, more than {max_texts}; send fewer at a time.")
    for index, row in enumerate(rows):
        if len(row) != (2 if pair else 1):
            raise ProblemError(422, f"inputs[{index}] holds {len(row)} texts, but the model takes {wanted}.")
        if not all(text.strip() for text in row):
            raise ProblemError(422, f"inputs[{index}] is empty; leave it out or give it some text.")
    return [row[0] for row in rows], [row[1] for row in rows] if pair else None, single


def refuse_truncated(truncated: Sequence[bool], max_length: int) -> None:
    """Refuses texts that were cut.

    Raises:
        ProblemError: 413, as TEI answers them.
    """
    for index, cut in enumerate(truncated):
        if cut:
            raise ProblemError(413, f"inputs[{index}] has more than {max_length} tokens; send it with truncate: true.")


def scores(engine: Engine, logits: FloatArray, apply: Apply | None = None, top_k: int | None = None) -> list[list[Any]]:
    """For each text its classes with their scores, the likeliest first."""
    names = class_names(engine.spec.labels)
    values = _applied(engine, logits, apply)
    found = []
    for row in values:
        order = np.argsort(-row, kind="stable")[:top_k]
        found.append([{"score": _number(row[index]), "label": names[index]} for index in order])
    return found


def _number(value: np.floating[Any]) -> float | None:
    return float(value) if np.isfinite(value) else None


def _applied(engine: Engine, logits: FloatArray, apply: Apply | None) -> FloatArray:
    if apply == "none":
        return logits
    if apply is None:
        return np.concatenate(list(engine.probabilities(logits).values()), axis=1)
    function: Callable[[FloatArray], FloatArray] = expit if apply == "sigmoid" else _softmax
    return np.concatenate([function(logits[:, span]) for _, span in spans(engine.spec.labels)], axis=1)


def _softmax(logits: FloatArray) -> FloatArray:
    found: FloatArray = softmax(logits, axis=1)
    return found


def information(engine: Engine, settings: ServeSettings, name: str, version: str, release: str) -> Mapping[str, Any]:
    """What TEI's `/info` tells."""
    names = class_names(engine.spec.labels)
    return {
        "model_id": name,
        "model_sha": version,
        "model_dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(
            engine.precision, engine.precision
        ),
        "model_type": {
            "classifier": {
                "id2label": {str(index): each for index, each in enumerate(names)},
                "label2id": {each: index for index, each in enumerate(names)},
            }
        },
        "max_concurrent_requests": settings.max_queued,
        "max_input_length": engine.spec.max_length,
        "max_batch_tokens": settings.batch_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_texts,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": release,
        "sha": None,
        "docker_label": None,
    }


def with_error_members(error: ProblemError) -> ProblemError:
    """The same problem with what TEI's clients look for."""
    error.members = {"error": error.detail, "error_type": _ERROR_TYPES.get(error.status, "validation")}
    return error
