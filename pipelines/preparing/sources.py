"""From what a recipe names to the files to read, wherever they lie."""

import hashlib
import json
from difflib import get_close_matches

from upath import UPath

from models.settings import InputError
from pipelines.locate import identity, locate, telling_read_errors
from pipelines.prepared import SPLITS
from pipelines.preparing.data import DataSettings, split_name
from pipelines.preparing.formats import EXTENSIONS, Source, look, look_at_parquet, saved_by_datasets

HUB = "hub://"


def references(settings: DataSettings) -> list[tuple[str | None, str]]:
    """What the recipe names as sources, each with its given split.

    Raises:
        InputError: the mapping has another key than a split's name, or no training data.
    """
    source = settings.source
    if not isinstance(source, dict):
        return [(None, reference) for reference in _listed(source)]
    if unknown := [key for key in source if split_name(key) is None]:
        raise InputError(f"data.source: {unknown[0]!r} is no split; there are {', '.join(SPLITS)}.")
    if "train" not in map(split_name, source):
        raise InputError("data.source: the mapping needs an entry for train.")
    return [(split_name(key), reference) for key, listed in source.items() for reference in _listed(listed)]


def sources_identity(settings: DataSettings) -> str:
    """A digest of all source data; of a hub dataset, its id and revision.

    Raises:
        InputError: a file is missing.
    """
    parts = []
    for split, reference in references(settings):
        if reference.startswith(HUB):
            from pipelines.preparing.hub import hub_identity  # imports `datasets`, which takes a second

            parts.append((split, hub_identity(reference)))
        else:
            parts.append((split, identity(expand(reference))))
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def find_sources(settings: DataSettings, fetched: UPath) -> list[Source]:
    """Every file to read, in order, looked at so that a wrong column or format is told before anything runs.

    Hub datasets are first written as Parquet files below `fetched`, where all nodes can read them.

    Raises:
        InputError: a file is missing, empty, of an unknown format, or lacks a column that the recipe uses.
    """
    found: list[Source] = []
    given_as: dict[str, str | None] = {}
    for position, (split, reference) in enumerate(references(settings)):
        if reference.startswith(HUB):
            from pipelines.preparing.hub import fetch

            pairs = fetch(reference, split, fetched / f"{position:03d}")
            sources = [look_at_parquet(path, given) for given, path in pairs]
            places = [f"{reference}, {'/'.join(path.parts[-2:])}" for _, path in pairs]
        else:
            sources = [source for path in expand(reference) for source in look(path, settings, split)]
            places = [source.path for source in sources]
        for source, place in zip(sources, places, strict=True):
            if given_as.setdefault(place, source.split) != source.split:
                raise InputError(f"{place} is read as {given_as[place]} and as {source.split}; a row is in one split.")
        found += sources
    for source in found:
        check_columns(source, settings)
    if not any(source.rows or source.size for source in found):
        raise InputError(f"{found[0].path} is empty.")
    return found


def _listed(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def expand(reference: str) -> list[UPath]:
    """The files that a reference stands for: one, those a glob matches, or those in a folder.

    Raises:
        InputError: there is none.
    """
    # In the URL of a page these signs are plain ones, and there is no listing to match.
    if not reference.startswith(("http://", "https://")) and any(sign in reference for sign in "*?["):
        position = min(reference.index(sign) for sign in "*?[" if sign in reference)
        base, _, _ = reference[:position].rpartition("/")
        pattern = reference[len(base) + 1 :] if base else reference
        if base.endswith(":/"):
            base += "/"
        elif base.startswith("package://"):
            base += "/."
        folder = locate(base or ("/" if reference.startswith("/") else "."))
        with telling_read_errors(reference):
            files = sorted((path for path in folder.glob(pattern) if path.is_file()), key=str)
        if not files:
            raise InputError(f"{reference} matches no file (looked in {folder}).")
        return files
    path = locate(reference)
    with telling_read_errors(reference):
        if not path.is_dir() or saved_by_datasets(path):
            return [path]
        files = sorted((entry for entry in path.iterdir() if entry.suffix.lower() in EXTENSIONS), key=str)
    if not files:
        known = ", ".join(dict.fromkeys(EXTENSIONS.values()))
        raise InputError(f"{reference} is a folder without data files; known forms are {known}.")
    return files


def check_columns(source: Source, settings: DataSettings) -> None:
    """Makes sure that a file has every column that the recipe uses.

    Raises:
        InputError: names the first one that it lacks, and the likeliest one meant.
    """
    for column in settings.used_columns:
        if column not in source.columns:
            close = get_close_matches(column, source.columns, n=1)
            meant = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(source.columns)}."
            raise InputError(f"{source.path} has no column {column!r}; {meant}")
