"""What is said over HTTP: the shape of requests and answers, and what is wrong with a request that has another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from models.engine import Answer
from serve.problems import ProblemError

Pair = Annotated[list[str], Field(min_length=2, max_length=2, description="A text and its partner.")]

_JSON_NAMES = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
_EXAMPLES = {False: {"texts": ["The flight was late again."]}, True: {"texts": [["A man sleeps.", "A man rests."]]}}


class ColumnAnswer(BaseModel):
    """What is said of one label column."""

    label: str | list[str] | None = Field(
        description="The likeliest class; a list of all that hold (1/2 or more) for a multi-label column; "
        "null, or the name chosen for that, where none is likely enough; null where the model gave no finite numbers."
    )
    probabilities: dict[str, float] = Field(description="The calibrated probability of every class.")


class TextAnswer(BaseModel):
    """What is said of one text."""

    labels: dict[str, ColumnAnswer] = Field(description="By label column.")
    truncated: bool = Field(description="Whether the text was longer than the model reads; its end was not seen.")
    tokens: int = Field(description="Tokens that the model read, special tokens included.")
    windows: int = Field(description="Windows in which it was read; 1 where it is not longer than the model reads.")


class ClassifyResponse(BaseModel):
    """One answer for each text, in the order of the request."""

    model: str = Field(description="The model's name.")
    version: str = Field(description="The fingerprint of the model's artifact.")
    results: list[TextAnswer]


class Problem(BaseModel):
    """An error (RFC 9457): one sentence in `detail`."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str


@dataclass(frozen=True)
class RequestShape:
    """What a request must look like for one model."""

    pair: bool
    max_texts: int
    model: type[BaseModel]
    """As pydantic model, for parsing and for the OpenAPI document."""

    @classmethod
    def of(cls, *, pair: bool, max_texts: int) -> "RequestShape":
        """The shape for a model that takes single texts or pairs of texts."""
        what = "Pairs to classify: each a list of two texts." if pair else "Texts to classify."
        items = list[Pair] if pair else list[str]
        field = Field(min_length=1, max_length=max_texts, description=what)
        config = ConfigDict(extra="forbid", strict=True)
        model: type[BaseModel] = create_model("ClassifyRequest", __config__=config, texts=(items, field))
        return cls(pair, max_texts, model)

    def json_schema(self) -> dict[str, Any]:
        """The request's JSON schema."""
        return {**self.model.model_json_schema(), "examples": [_EXAMPLES[self.pair]]}

    def parse(self, body: bytes) -> tuple[list[str], list[str] | None]:
        """The texts, and their partners where the model takes pairs.

        Raises:
            ProblemError: 400 where the body cannot be read as JSON in UTF-8, 422 where it has another shape.
        """
        try:
            items: list[Any] = self.model.model_validate_json(body).texts  # type: ignore[attr-defined]
        except ValidationError as error:
            raise self._problem(error.errors(include_url=False, include_context=True)[0]) from None
        for index, item in enumerate(items):
            for text in item if self.pair else (item,):
                if not text.strip():
                    raise ProblemError(422, f"texts[{index}] is empty; leave it out or give it some text.")
        return ([item[0] for item in items], [item[1] for item in items]) if self.pair else (items, None)

    def _problem(self, error: ErrorDetails) -> ProblemError:
        wanted = '{"texts": [["...", "..."], ...]}' if self.pair else '{"texts": ["...", ...]}'
        where = _path(error["loc"])
        match error["type"]:
            case "too_long" if where == "texts":
                return ProblemError(422, f"texts holds more than {self.max_texts} texts; send fewer at a time.")
            case "too_short" if where == "texts":
                return ProblemError(422, "texts is empty; send at least one text.")
            case "too_long" | "too_short":
                return ProblemError(422, f"{where} must be a list of two texts, [text, partner].")
        right = {0: "a list", 1: "a list of two texts, [text, partner]" if self.pair else "a string"}
        return shape_problem(error, wanted, right.get(len(error["loc"]) - 1, "a string"))


def shape_problem(error: ErrorDetails, wanted: str, right: str) -> ProblemError:
    """What is wrong with a body that cannot be read as JSON, or has not the fields or types that are asked for.

    Args:
        error: as pydantic tells it.
        wanted: an example of a body.
        right: what the value at that place must be, "a string" for example.
    """
    where = _path(error["loc"])
    match error["type"]:
        case "json_invalid":
            reason = str(error.get("ctx", {}).get("error", error["msg"]))
            if "hex escape" in reason:
                return ProblemError(422, f"A \\u escape is half of a surrogate pair, which is no character: {reason}.")
            return ProblemError(400, f"The request's body cannot be read as JSON in UTF-8: {reason}; send {wanted}.")
        case "missing":
            return ProblemError(422, f"The field {where} is missing; send {wanted}.")
        case "extra_forbidden":
            return ProblemError(422, f"{where} is no field of a request; send {wanted}.")
    given = _JSON_NAMES.get(type(error["input"]), "null" if error["input"] is None else "an object")
    if not error["loc"]:
        return ProblemError(422, f"The request's body must be an object, not {given}; send {wanted}.")
    return ProblemError(422, f"{where} must be {right}, not {given}.")


def _path(location: Sequence[int | str]) -> str:
    """`texts[3]` for ("texts", 3), cut where a client made it long."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")[:80]


def answers_as_json(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The `results` of a response; probabilities are rounded to six digits."""
    return [
        {
            "labels": {
                name: {
                    "label": prediction.label,
                    "probabilities": {cls: round(value, 6) for cls, value in prediction.probabilities.items()},
                }
                for name, prediction in answer.labels.items()
            },
            "truncated": answer.truncated,
            "tokens": answer.tokens,
            "windows": answer.windows,
        }
        for answer in answers
    ]
