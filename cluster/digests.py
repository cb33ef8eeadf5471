"""SHA-256 digests of files in a store: taken when they are registered, compared before they are used."""

import hashlib
from collections.abc import Iterable, Mapping

from upath import UPath


def digest(file: UPath) -> str:
    """The SHA-256 of a file's content, which is read in parts."""
    with file.fs.open(file.path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def digests(folder: UPath) -> dict[str, str]:
    """The digest of every file below `folder`, by its path relative to it; hidden files are no part of it."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {name: digest(file) for name, file in sorted(files.items()) if not file.name.startswith(".")}


def difference(folder: UPath, sha256: Mapping[str, str], names: Iterable[str] | None = None) -> str:
    """The first file that is missing or another one than expected, in a few words; empty where there is none.

    Args:
        folder: where the files are.
        sha256: their digests, by path relative to it.
        names: those to look at; all where None.
    """
    for name in sha256 if names is None else names:
        try:
            found = digest(folder / name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return f"{name} is missing"
        if found != sha256.get(name):
            return f"{name} is damaged or changed: its SHA-256 is not the one that was registered"
    return ""
