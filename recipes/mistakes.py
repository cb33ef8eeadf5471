"""What is wrong with settings, told to whoever wrote them: one sentence for each mistake, with its path."""

import difflib
import json
import re
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from recipes.recipe import Recipe


def sentences(errors: Sequence[ErrorDetails]) -> Iterator[str]:
    """One sentence for each mistake, however many branches of a union pydantic tried on it."""
    yield from _tell([(_locate(error["loc"]), error) for error in errors], 0)


def _tell(located: "list[tuple[_Place, ErrorDetails]]", depth: int) -> Iterator[str]:
    told: set[tuple[Any, ...]] = set()
    for place, error in located:
        if len(place.unions) <= depth:
            yield _sentence(place, error)
            continue
        union, _ = place.unions[depth]
        if union in told:
            continue
        told.add(union)
        tried = [(p, e) for p, e in located if len(p.unions) > depth and p.unions[depth][0] == union]
        deepest = max(len(p.path) for p, _ in tried)
        if deepest == len(union):
            yield f"{_dotted(union)} must be {value_phrase(_annotation(union))}, not {_given(error)}."
        else:  # Into one branch the value went further: that one was meant.
            meant = next(p.unions[depth] for p, _ in tried if len(p.path) == deepest)
            yield from _tell([(p, e) for p, e in tried if p.unions[depth] == meant], depth + 1)


class _Place:
    """Where in the recipe an error is: pydantic's location without the names of the union branches it tried."""

    def __init__(self) -> None:
        self.path: tuple[Any, ...] = ()
        self.unions: list[tuple[tuple[Any, ...], Any]] = []
        """The path of each union on the way, outermost first, with the branch that was tried."""
        self.annotation: Any = Recipe


def _locate(location: Sequence[Any]) -> _Place:
    place = _Place()
    for part in location:
        if part == "[key]":
            continue
        branches = [each for each in _branches(place.annotation) if each is not type(None)]
        if len(branches) > 1:
            place.unions.append((place.path, part))
            place.annotation = next((each for each in branches if _tag(each) == str(part).replace(" ", "")), None)
            if place.annotation is not None:
                continue
            place.annotation = Any
        place.annotation = _inner(branches[0] if branches else Any, part)
        place.path = (*place.path, part)
    return place


def _annotation(path: Sequence[Any]) -> Any:
    annotation: Any = Recipe
    for part in path:
        branches = _branches(annotation)
        annotation = next((found for each in branches if (found := _inner(each, part)) is not Any), Any)
    return annotation


def _branches(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def _inner(annotation: Any, part: Any) -> Any:
    """The annotation of the field, item or value `part` of what `annotation` describes."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(part) if isinstance(part, str) else None
        return field.annotation if field else Any
    match get_origin(annotation), get_args(annotation):
        case (origin, (item, *_)) if origin in (tuple, list) and isinstance(part, int):
            return item
        case (origin, (_, value)) if origin is dict:
            return value
    return Any


def _tag(annotation: Any) -> str:
    """What pydantic calls a branch of a union in an error's location."""
    if get_origin(annotation) is Literal:
        return f"literal[{','.join(repr(value) for value in get_args(annotation))}]"
    if get_origin(annotation) is None:
        return str(getattr(annotation, "__name__", annotation))
    inner = [each for each in get_args(annotation) if each is not Ellipsis]
    names = ",".join(_tag(each) if len(_branches(each)) == 1 else _union_tag(each) for each in inner)
    suffix = ",..." if Ellipsis in get_args(annotation) else ""
    return f"{get_origin(annotation).__name__}[{names}{suffix}]"


def _union_tag(annotation: Any) -> str:
    return f"union[{','.join(_tag(each) for each in _branches(annotation))}]"


def _sentence(place: _Place, error: ErrorDetails) -> str:
    path = _dotted(place.path)
    kind, message = error["type"], error["msg"]
    match kind:
        case "extra_forbidden":
            return f"{path} is no setting; {_meant(place.path)}"
        case "missing":
            return f"{path} is missing."
        case "value_error":
            told = message.removeprefix("Value error, ").rstrip(".")
            return f"{path}: {told}." if path else f"{told}."
        case "string_pattern_mismatch":
            return f"{path} must match {error.get('ctx', {}).get('pattern')}, not {_given(error)}."
    if error["loc"] and error["loc"][-1] == "[key]":
        return f"{path}: the key must be text; put quotes around it."
    if re.search("_type$|_parsing$|^literal_error$|^int_from_float$", kind):
        return f"{path or 'the recipe'} must be {value_phrase(place.annotation)}, not {_given(error)}."
    return f"{path} {message.replace('Input should', 'must', 1)}, not {_given(error)}."


def _meant(path: Sequence[Any]) -> str:
    key = str(path[-1])
    model = next((each for each in _branches(_annotation(path[:-1])) if _is_model(each)), Recipe)
    fields = list(model.model_fields)
    if close := difflib.get_close_matches(key, fields, n=1):
        return f"did you mean {_dotted([*path[:-1], close[0]])}?"
    elsewhere = dict(_all_settings(Recipe))
    if same := [name for name, last in elsewhere.items() if last == key]:
        return f"did you mean {' or '.join(same)}?"
    return f"there are {', '.join(fields)}."


def _all_settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield prefix + name, name
        for branch in _branches(field.annotation):
            if _is_model(branch):
                yield from _all_settings(branch, f"{prefix}{name}.")


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def value_phrase(annotation: Any) -> str:
    """What a value of this annotation is called, in messages and in the reference."""
    match get_origin(annotation), get_args(annotation):
        case (origin, _) if origin in (Union, types.UnionType):
            return " or ".join(value_phrase(each) for each in _branches(annotation))
        case (origin, values) if origin is Literal:
            return ("one of " if len(values) > 1 else "") + ", ".join(map(str, values))
        case (origin, (item, *_)) if origin in (tuple, list):
            return f"a list (each {value_phrase(item)})"
        case (origin, (_, value)) if origin is dict:
            return f"a mapping (each value {value_phrase(value)})"
    if _is_model(annotation):
        fields = list(annotation.model_fields)
        return f"a mapping of {', '.join(fields[:6])}{', ...' if len(fields) > 6 else ''}"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(annotation, "something else")


def _given(error: ErrorDetails) -> str:
    try:
        text = json.dumps(error["input"], ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(error["input"])
    return text if len(text) <= 80 else f"{text[:77]}..."


def _dotted(path: Sequence[Any]) -> str:
    """The path as an override writes it."""
    text = ""
    for part in path:
        name = str(part)
        text += f"[{name}]" if "." in name else f".{name}" if text else name
    return text


def misplaced_booleans(value: Any, path: tuple[Any, ...]) -> Iterator[str]:
    """pydantic takes true for 1; where a recipe says `epochs: yes`, that is a mistake."""
    if isinstance(value, bool):
        annotation = _annotation(path)
        if annotation is not Any and not {bool, str} & set(_branches(annotation)):
            yield f"{_dotted(path)} must be {value_phrase(annotation)}, not {json.dumps(value)}."
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from misplaced_booleans(inner, (*path, key))
