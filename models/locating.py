"""Finding what settings refer to: data files, encoders, lists of names."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from upath import UPath

from models.settings import InputError, first_line

_PACKAGE = re.compile(r"package://(?P<package>\w+(\.\w+)*)/(?P<path>.+)")
_PLACELESS = re.compile(r"(?P<scheme>https?|s3a?|gs|gcs|az|abfss?)://(/|$)")
_LOCAL = ("", "file")


def locate(reference: str) -> UPath:
    """The file or folder that `reference` names: a path, a URL, or `package://NAME/PATH`.

    `package://` finds a file inside an installed Python package without importing it.

    Raises:
        InputError: there is none, it cannot be reached, or `reference` is malformed.
    """
    if not reference.strip():
        raise InputError("an empty name stands where a path, a URL or package://NAME/PATH is needed.")
    if reference.startswith("package://"):
        return _locate_in_package(reference)
    if match := _PLACELESS.match(reference):
        raise InputError(f"{reference} names no bucket or host; write {match['scheme']}://BUCKET_OR_HOST/PATH.")
    with telling_read_errors(reference):
        path = UPath(reference) if "://" in reference else UPath(Path(reference).expanduser().absolute())
        found = path.exists()
        web = path.protocol in ("http", "https")
        if not found and not web and path.protocol not in _LOCAL:
            # `exists` is False also where a bucket may not be listed; this tells why.
            with contextlib.suppress(FileNotFoundError):
                path.fs.ls(path.path)
    if not found:
        doubt = ", or its host does not answer" if web else f" (looked at {path})"
        raise InputError(f"{reference} does not exist{doubt}.")
    return path


def _locate_in_package(reference: str) -> UPath:
    match = _PACKAGE.fullmatch(reference)
    if match is None:
        raise InputError(f"{reference} is not of the form package://NAME/PATH.")
    package, path = match["package"], match["path"]
    try:
        spec = importlib.util.find_spec(package)
    except ImportError:  # of what stands before its last dot
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{reference}: the Python package {package!r} is not installed here.")
    for folder in spec.submodule_search_locations:
        if (candidate := Path(folder) / path).exists():
            return UPath(candidate)
    raise InputError(f"{reference}: the package {package!r} has no file or folder {path!r}.")


@contextlib.contextmanager
def telling_read_errors(place: object, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turns what a filesystem raises into one sentence about `place`.

    `kinds` are the errors that are meant; by default all, as each filesystem's library has kinds of its own. So the
    block must do nothing but find and read.

    Raises:
        InputError: in the place of the error.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"{place} cannot be read: {reason_of(error)}.") from error


def reason_of(error: Exception) -> str:
    """What an error says in its first line, without a full stop; its kind, where it says nothing."""
    text = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    return text.rstrip(".:; ")
