"""Reading a recipe: YAML, overrides with dots, and every mistake told in one sentence with its path."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml import MarkedYAMLError, YAMLError

from models.settings import InputError
from recipes.mistakes import misplaced_booleans, sentences
from recipes.recipe import Recipe
from serve.gates import Plan
from serve.settings import ServeSettings


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe at `path` with `KEY=VALUE` overrides applied, in their order.

    A key has dots, and a number picks from a list: `data.labels.0.column`. A key that itself holds a dot stands in
    brackets: `data.where[user.name]`. A value is YAML and replaces what was there.

    Raises:
        InputError: names the file or override, the key and what would be right; one line for each mistake.
    """
    config = _read(Path(path))
    for override in overrides:
        _override(config, override)
    values = _values(config, f"{path}: ")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(f"{path}: {sentence}" for sentence in sentences(error.errors()))) from error


def load_serve_settings(overrides: Sequence[str]) -> ServeSettings:
    """The endpoint's settings where there is no recipe: the defaults with `serve.KEY=VALUE` overrides applied.

    Raises:
        InputError: names the override, the key and what would be right; one line for each mistake.
    """
    config = OmegaConf.create({"serve": {}})
    for override in overrides:
        key, equals, _ = override.partition("=")
        if equals and key.partition(".")[0].strip() != "serve":
            raise InputError(f"{override!r}: of a registered model only serve can be set, for example serve.port=8001.")
        _override(config, override)
    try:
        return ServeSettings.model_validate(_values(config, "")["serve"])
    except ValidationError as error:
        located = [ErrorDetails(**{**each, "loc": ("serve", *each["loc"])}) for each in error.errors()]
        raise InputError("\n".join(sentences(located))) from error


def load_plan(overrides: Sequence[str]) -> Plan:
    """The steps and gates of a rollout: the defaults with `KEY=VALUE` applied.

    Raises:
        InputError: names the override, the key and what would be right; one line for each mistake.
    """
    config = OmegaConf.create({})
    for override in overrides:
        _override(config, override)
    try:
        return Plan.model_validate(_values(config, ""))
    except ValidationError as error:
        raise InputError("\n".join(sentences(error.errors()))) from error


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("recipes").glob("*.yaml")))
        raise InputError(f"{path} is no file." + (f" Ready recipes: {known}." if known else ""))
    try:
        config = OmegaConf.load(path)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(f"{path} is not YAML: {where}{_reason(error)}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not YAML: it is not UTF-8 text (byte {error.start}).") from error
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as YAML: {_reason(error)}.") from error
    if not isinstance(config, DictConfig):
        raise InputError(f"{path} is no recipe: it must be a mapping with name, data and finetune.")
    return config


def _values(config: DictConfig, place: str) -> dict[str, Any]:
    """What the config says, with the values that refer to others filled in; a mistake is told with its place."""
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{place}{_reason(error)}.") from error
    if flags := list(misplaced_booleans(values, ())):
        raise InputError("\n".join(f"{place}{sentence}" for sentence in flags))
    return dict(values)


def _override(config: DictConfig, override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{override!r} is no override: write KEY=VALUE, for example finetune.epochs=3.")
    _refuse_path_through_value(config, key.strip(), override)
    try:
        # from_dotlist reads the value as recipes are read (5e-5 is a number, [a, b] a list); under a key of one letter,
        # because the real one may pick from a list, which from_dotlist knows nothing of.
        value = OmegaConf.from_dotlist([f"v={override[len(key) + 1 :]}"])._get_node("v")
        OmegaConf.update(config, key.strip(), value, merge=False, force_add=True)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, IndexError, RecursionError) as error:
        raise InputError(f"the override {override!r} cannot be applied: {_reason(error)}.") from error


def _refuse_path_through_value(config: DictConfig, key: str, override: str) -> None:
    """OmegaConf would replace a plain value on the way by a mapping, and what the recipe said would be lost."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        before = ".".join(parts[:end])
        with contextlib.suppress(OmegaConfBaseException, ValueError, IndexError):
            value = OmegaConf.select(config, before)
            if value is not None and not OmegaConf.is_config(value):
                raise InputError(
                    f"the override {override!r} cannot be applied: {before} is {json.dumps(value, default=str)} "
                    f"and has no parts; give {before}=... as a whole."
                )


def _reason(error: BaseException) -> str:
    """What a library says is wrong, on one line, without its account of where it was."""
    if isinstance(error, MarkedYAMLError) and (error.problem or error.context):
        return str(error.problem or error.context).rstrip(".")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, OmegaConfBaseException):
        return (f"{error.full_key}: " if error.full_key else "") + lines[0].rstrip(".")
    return " ".join(" ".join(lines).split()).rstrip(".")
