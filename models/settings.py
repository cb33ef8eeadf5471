"""The base of every settings model, and the error that tells a user what to mend."""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Part = TypeVar("Part", bound="Settings")

Precision = Literal["bf16", "fp16", "fp32"]
"""What a model computes in; `models.precision` knows what the hardware has."""


class InputError(Exception):
    """A mistake in what the user gave (data, recipe, request): one sentence that says what and where."""


def read_settings(kind: type[Part], file: Path, what: str) -> Part:
    """The settings that a JSON file holds; `what` its folder has where it has the file.

    Raises:
        InputError: it is not there, or damaged.
    """
    try:
        return kind.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file.parent} holds no {what}: there is no {file.name} in it.") from error
    except ValueError as error:
        raise InputError(f"{file} is damaged: copy or make it again.") from error


def first_line(error: BaseException) -> str:
    """What an error says in its first line, and in the next where that only announces it; its kind, if nothing."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


def execution(default: Any = ..., **field: Any) -> Any:
    """A field that says how a stage runs (workers, intervals), not what it makes.

    Such fields stay out of the fingerprint: a run with other workers finds the same artifact.
    """
    return Field(default, json_schema_extra={"execution": True}, **field)


def added(default: Any, **field: Any) -> Any:
    """A field that a stage was given when there were artifacts without it.

    At its default it stays out of the fingerprint, so that they are still found.
    """
    return Field(default, json_schema_extra={"added": True}, **field)


class Settings(BaseModel):
    """Settings of one stage or part: immutable, described at each field, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def identity(self) -> dict[str, Any]:
        """The values that decide the outcome, as plain JSON types: what a fingerprint is taken of."""
        return {
            name: _plain(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not _is_execution(field) and not (_is_added(field) and getattr(self, name) == field.default)
        }

    def only(self, kind: type[Part]) -> Part:
        """The fields that come from one of the bases, as that: what a process that knows no more is sent."""
        return kind.model_validate(self.model_dump(include=set(kind.model_fields)))


def _is_execution(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("execution"))


def _is_added(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("added"))


def _plain(value: Any) -> Any:
    match value:
        case Settings():
            return value.identity()
        case BaseModel():
            return value.model_dump(mode="json")
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value
