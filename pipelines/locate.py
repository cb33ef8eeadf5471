"""Finding what a recipe refers to (data files, encoders) and taking its identity for fingerprints."""

import hashlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from upath import UPath

from models.settings import InputError

_PACKAGE = re.compile(r"package://(?P<package>[^/]+)/(?P<path>.+)")
_WHOLE_BELOW = 64 * 2**20
_SAMPLE = 2**20


def locate(reference: str) -> UPath:
    """The file or folder that `reference` names: a path, a URL, or `package://NAME/PATH`.

    `package://` finds a file inside an installed Python package without importing it.

    Raises:
        InputError: there is none.
    """
    if match := _PACKAGE.fullmatch(reference):
        return _locate_in_package(reference, match["package"], match["path"])
    path = UPath(reference) if "://" in reference else UPath(Path(reference).expanduser().absolute())
    try:
        found = path.exists()
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{reference} cannot be read: {error}.") from error
    if not found:
        raise InputError(f"{reference} does not exist (looked at {path}).")
    return path


def _locate_in_package(reference: str, package: str, path: str) -> UPath:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{reference}: the Python package {package!r} is not installed here.")
    for folder in spec.submodule_search_locations:
        if (candidate := Path(folder) / path).exists():
            return UPath(candidate)
    raise InputError(f"{reference}: the package {package!r} has no file or folder {path!r}.")


def identity(paths: Iterable[UPath]) -> str:
    """A digest of what the files (or all files in the folders) hold, in the given order.

    Names and dates do not count, so a moved or touched file is the same data. A file above 64 MiB is
    digested by its size, its modification time (or etag), and its first and last MiB instead of the whole.
    """
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            digest.update(_file_identity(file))
    return digest.hexdigest()[:32]


def _file_identity(file: UPath) -> bytes:
    info = file.fs.info(file.path)
    size = int(info["size"] or 0)
    digest = hashlib.sha256(f"{size}:".encode())
    with file.fs.open(file.path, "rb") as stream:
        if size <= _WHOLE_BELOW:
            digest.update(stream.read())
        else:
            digest.update(str(info.get("ETag") or info.get("mtime")).encode())
            digest.update(stream.read(_SAMPLE))
            stream.seek(size - _SAMPLE)
            digest.update(stream.read(_SAMPLE))
    return digest.digest()
