"""Finding what a recipe refers to (data files, encoders) and taking its identity for fingerprints."""

import hashlib
from collections.abc import Iterable

from upath import UPath

from cluster.store import is_local
from models.locating import locate, reason_of, telling_read_errors

__all__ = ["identity", "locate", "reason_of", "telling_read_errors"]

_WHOLE_LOCAL, _WHOLE_REMOTE = 2**32, 2**26
_SAMPLE = 2**20


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
