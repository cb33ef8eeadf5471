"""Parts of the OpenAPI document that FastAPI does not write by itself, since routes read their bodies themselves."""

from collections.abc import Mapping
from typing import Any

from serve.problems import MEDIA_TYPE
from serve.schemas import Problem


def problems_of(statuses: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for the OpenAPI document."""
    return {
        status: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": text}
        for status, text in statuses.items()
    }


def body_of(schema: dict[str, Any]) -> dict[str, Any]:
    """A route's body, for the OpenAPI document."""
    parts = schema.pop("$defs", {})

    def inlined(value: Any) -> Any:
        """The schema with its parts in their places: references would look for them in the document's root."""
        match value:
            case {"$ref": str() as reference}:
                return inlined(
                    {**parts[reference.rpartition("/")[2]], **{k: v for k, v in value.items() if k != "$ref"}}
                )
            case dict():
                return {name: inlined(each) for name, each in value.items()}
            case list():
                return [inlined(each) for each in value]
        return value

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined(schema)}}}}
