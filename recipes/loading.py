"""Reading a recipe: YAML, overrides with dots, and every mistake told in one sentence with its path."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml import YAMLError

from models.settings import InputError
from recipes.recipe import Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe at `path` with `KEY=VALUE` overrides applied; keys have dots.

    Raises:
        InputError: names the file or override, the key and what would be right; one line for each mistake.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("recipes").glob("*.yaml")))
        raise InputError(f"{path} is no file." + (f" Ready recipes: {known}." if known else ""))
    try:
        config: Any = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not OmegaConf.is_dict(config):
        raise InputError(f"{path} is no recipe: it must be a mapping with name, data and finetune.")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise InputError(f"{override!r} is no override: write KEY=VALUE, for example finetune.epochs=3.")
        try:
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise InputError(f"the override {override!r} cannot be read: {' '.join(str(error).split())}.") from error
    try:
        values = OmegaConf.to_container(config, resolve=True)
        return Recipe.model_validate(values)
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}.") from error
    except ValidationError as error:
        raise InputError("\n".join(f"{path}: {_sentence(detail)}" for detail in error.errors())) from error


def _sentence(detail: ErrorDetails) -> str:
    location = [part for part in detail["loc"] if isinstance(part, int) or part.isidentifier() or "." in part]
    path = ".".join(str(part) for part in location)
    given = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            key = str(location[-1])
            fields = list(_model_at(location[:-1]).model_fields)
            close = difflib.get_close_matches(key, fields, n=1)
            meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(fields)}."
            return f"{path} is no setting; {meant}"
        case "missing":
            return f"{path} is missing."
        case "value_error":
            return f"{path + ': ' if path else ''}{detail['msg'].removeprefix('Value error, ')}."
        case _:
            return f"{path}: {detail['msg'][0].lower()}{detail['msg'][1:]}, not {given!r}."


def _model_at(location: Sequence[Any]) -> type[BaseModel]:
    """The settings model that the path leads to, as far as it can be followed."""
    model: type[BaseModel] = Recipe
    for part in location:
        if part in model.model_fields:
            annotation = model.model_fields[part].annotation
            candidates = [annotation, *get_args(annotation)]
            candidates += [inner for candidate in candidates for inner in get_args(candidate)]
            for candidate in candidates:
                if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                    model = candidate
    return model
