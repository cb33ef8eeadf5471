"""Fills the reference pages from the code: the recipe's settings from its schema, the commands from `shoal` itself."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

sys.path.insert(0, str(Path(__file__).parent.parent))

import shoal
from recipes.mistakes import value_phrase
from recipes.recipe import Recipe


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the markers `<!-- recipe settings -->` and `<!-- commands -->`."""
    markdown = markdown.replace("<!-- recipe settings -->", "\n".join(_model(Recipe, "")))
    return markdown.replace("<!-- commands -->", "\n".join(_commands()))


def _model(model: type[BaseModel], path: str) -> Iterator[str]:
    """A table of the model's plain settings, then a section for each part."""
    parts = {name: part for name, field in model.model_fields.items() if (part := _part(field))}
    plain = {name: field for name, field in model.model_fields.items() if name not in parts or field.description}
    if path:
        yield f"\n## {path}\n\n{(model.__doc__ or '').strip()}\n"
    if plain:
        yield "| Setting | Default | Type | |\n|---|---|---|---|"
    for name, field in plain.items():
        dotted = f"{path}.{name}" if path else name
        runs = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("execution")
        note = " *How it runs only: no part of the fingerprint.*" if runs else ""
        yield f"| `{dotted}` | {_default(field)} | {_cell(_kind(field))} | {_cell(field.description or '')}{note} |"
    for name, part in parts.items():
        yield from _model(part, f"{path}.{name}" if path else name)


def _part(field: FieldInfo) -> type[BaseModel] | None:
    """The settings model that the field holds, alone, in a list, or as one of several choices."""
    pending = [field.annotation]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        pending += get_args(annotation)
    return None


def _kind(field: FieldInfo) -> str:
    limits = {"Ge": "from {0.ge}", "Gt": "above {0.gt}", "Le": "up to {0.le}", "Lt": "below {0.lt}"}
    told = [limits[name].format(each) for each in field.metadata if (name := type(each).__name__) in limits]
    kind = re.sub(r"a mapping of (\w+).*?(?= or |\)|$)", "a mapping", value_phrase(field.annotation))
    return ", ".join([kind, *told])


def _default(field: FieldInfo) -> str:
    if field.is_required() or field.default is PydanticUndefined:
        return "**required**"
    value = field.default
    if value is None:
        return "-"
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, dict):
        value = {
            name: each.model_dump(exclude_none=True) if isinstance(each, BaseModel) else each
            for name, each in value.items()
        }
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _commands() -> Iterator[str]:
    for name, command in typer.main.get_command(shoal.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        if inner is None:
            yield from _command(name, command)
        else:
            for its_name, each in inner.items():
                yield from _command(f"{name} {its_name}", each)


def _command(name: str, command: Any) -> Iterator[str]:
    yield f"\n## shoal {name}\n\n{command.help}\n"
    yield "| | |\n|---|---|"
    for each in command.params:
        if each.name == "help":
            continue
        shown = f"`{each.opts[-1]}`" if each.param_type_name == "option" else f"`{(each.metavar or each.name).upper()}`"
        needed = " *(required)*" if each.required else ""
        yield f"| {_cell(shown)} | {_cell(each.help or '')}{needed} |"
    lines = re.sub(r"^Examples?: ", "", command.epilog or "").split("    ")
    yield "\n```sh\n" + "\n".join(line.strip() for line in lines) + "\n```"
