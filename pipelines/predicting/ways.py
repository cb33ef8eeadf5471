"""How each of the files to predict is read.

A file's name tells its format, but `data.format` does where the recipe's own files end alike or the name tells none;
above both stands what the command says. Quotes, skipped lines and what becomes of bytes that are no UTF-8 are as the
command says, else as the recipe says for files of the recipe's own format, else as is usual.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from upath import UPath

from models.settings import InputError
from pipelines.preparing.data import DataSettings
from pipelines.preparing.formats import EXTENSIONS, Source, format_of, look
from pipelines.preparing.sources import HUB, check_columns, expand, find_sources, references, sources_identity

Given = tuple[Source, DataSettings]
"""A file to predict, and how it is read."""

_RULES = {"skip_rows", "quotes", "undecodable"}


def ways_to_read(source: str, recipe: DataSettings, rules: Mapping[str, Any]) -> list[DataSettings]:
    """How each file that `source` names (or the hub dataset) is read.

    Args:
        source: files, a folder, a pattern, a URL or a hub id.
        recipe: how the recipe's own data is read.
        rules: settings of `DataSettings` that count for all files, above the recipe's.

    Raises:
        InputError: a file is missing.
    """
    if source.startswith(HUB):
        return [_way(source, "parquet", recipe, rules)]
    endings = _endings_of(recipe)
    paths = expand(source)
    told = rules.get("format")
    kinds = [told or ("datasets" if path.is_dir() else _format_for(path, recipe, endings)) for path in paths]
    return [_way(str(path), kind, recipe, rules) for path, kind in zip(paths, kinds, strict=True)]


def files_to_predict(ways: Iterable[DataSettings], fetched: UPath) -> list[Given]:
    """Every file, looked at, and how it is read; of a hub dataset, copies below `fetched`.

    Raises:
        InputError: a file is empty, of an unknown format, or lacks the column with the text.
    """
    found = []
    for way in ways:
        place = str(way.source)
        for each in find_sources(way, fetched) if place.startswith(HUB) else look(UPath(place), way, None):
            check_columns(each, way)
            found.append((each, way))
    return found


def input_identity(source: str, ways: Iterable[DataSettings]) -> list[Any]:
    """What decides the rows that are read, as JSON.

    Raises:
        InputError: a file cannot be read.
    """
    decides = {"format", "text", "text_pair", *_RULES}
    return [sources_identity(DataSettings(source=source)), [way.model_dump(include=decides) for way in ways]]


def _way(source: str, kind: str, recipe: DataSettings, rules: Mapping[str, Any]) -> DataSettings:
    own = _formats_of(recipe)
    given = recipe.model_dump(include=_RULES) if kind in own or None in own else {}
    text = "text" if kind == "text" else recipe.text  # Lines have no columns: each is the text.
    return DataSettings(source=source, text=text, text_pair=recipe.text_pair, **{**given, **rules, "format": kind})


def _format_for(path: UPath, recipe: DataSettings, endings: set[str]) -> str:
    if recipe.format != "auto" and path.suffix.lower() in endings:
        return recipe.format
    return format_of(path) or recipe.format


def _endings_of(recipe: DataSettings) -> set[str]:
    """How the names of the recipe's own files end: those of the files in a folder, or that match a pattern, too."""
    endings: set[str] = set()
    for _, reference in references(recipe):
        names = [PurePosixPath(reference)]
        if recipe.format != "auto" and names[0].suffix.lower() not in EXTENSIONS and not reference.startswith(HUB):
            with suppress(InputError):  # What the recipe names may be gone; its classifier is there.
                names = [PurePosixPath(path.name) for path in expand(reference)]
        endings.update(name.suffix.lower() for name in names)
    return endings


def _formats_of(recipe: DataSettings) -> set[str | None]:
    """The formats of the recipe's own data, as far as names tell; None where one does not."""
    if recipe.format != "auto":
        return {recipe.format}
    return {EXTENSIONS.get(PurePosixPath(reference).suffix.lower()) for _, reference in references(recipe)}
