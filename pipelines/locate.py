"""Finding what a recipe refers to (data files, encoders) and taking its identity for fingerprints."""

import contextlib
import hashlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from upath import UPath

from cluster.store import is_local
from models.settings import InputError, first_line

_PACKAGE = re.compile(r"package://(?P<package>\w+(\.\w+)*)/(?P<path>.+)")
_PLACELESS = re.compile(r"(?P<scheme>https?|s3a?|gs|gcs|az|abfss?)://(/|$)")
_WHOLE_LOCAL, _WHOLE_REMOTE = 2**32, 2**26
_SAMPLE = 2**20


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
        if not found and not web and not is_local(path):
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


def identity(paths: Iterable[UPath]) -> str:
    """A digest of what the files (or all files in the folders) hold, in the given order.

    Names and dates do not count, so a moved or touched file is the same data. Of a local file above 4 GiB, or a
    remote one above 64 MiB, not the whole is read: it is known by its size, its etag (or modification time), and
    its first and last MiB.

    Raises:
        InputError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with telling_read_errors(path):
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            for file in files:
                digest.update(_file_identity(file))
    return digest.hexdigest()[:32]


def _file_identity(file: UPath) -> bytes:
    info = file.fs.info(file.path)
    size = int(info["size"] or 0)
    digest = hashlib.sha256(f"{size}:".encode())
    with file.fs.open(file.path, "rb") as stream:
        if size <= (_WHOLE_LOCAL if is_local(file) else _WHOLE_REMOTE):
            while block := stream.read(_SAMPLE):
                digest.update(block)
        else:
            digest.update(str(info.get("ETag") or info.get("mtime")).encode())
            digest.update(stream.read(_SAMPLE))
            stream.seek(size - _SAMPLE)
            digest.update(stream.read(_SAMPLE))
    return digest.digest()


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
