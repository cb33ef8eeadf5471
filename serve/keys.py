"""API keys: made, listed and revoked in one document of the store.

A key is `shoal_<id>_<secret>`. The document holds the SHA-256 of the secret and never the secret: whoever reads it can
ask nothing. A slow hash, as passwords need one, would add nothing: the secret is 192 random bits, which nobody guesses
at any speed.
"""

import hashlib
import math
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from upath import UPath

from cluster.claim import claimed
from cluster.store import STORAGE_ERRORS, ClusterError, is_local, telling_storage_errors, write_whole
from models.settings import InputError, first_line
from serve.access import SCOPES, Scope

KEYS = "keys.json"
PREFIX = "shoal_"

_SECRET_BYTES = 24
_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LONGEST = timedelta(days=36_500)


class ApiKey(BaseModel):
    """What is kept of a key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: str
    sha256: str
    """Of the secret, as hexadecimal digits."""
    scopes: tuple[Scope, ...]
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    rate: float | None = None
    """Requests a second that each replica takes of it, in place of `serve.rate`."""

    def state(self, now: datetime) -> Literal["valid", "expired", "revoked"]:
        """Whether it opens anything now."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    keys: list[ApiKey] = []


def read_keys(store: UPath) -> list[ApiKey]:
    """All keys of a store, in the order in which they were made; none where none was ever made.

    Raises:
        ClusterError: the store cannot be read, or the document is damaged.
    """
    return parse_keys(read_document(store), store)


def read_document(store: UPath) -> bytes:
    """The document as it stands; empty where none was ever written.

    Raises:
        ClusterError: the store cannot be read.
    """
    path = store / KEYS
    try:
        return bytes(path.fs.cat_file(path.path))
    except FileNotFoundError:
        if is_local(store) and not store.is_dir():  # A filesystem that is not mounted says nothing of its keys.
            raise ClusterError(f"cannot read {path}: there is no folder {store}.") from None
        return b""
    except STORAGE_ERRORS as error:
        raise ClusterError(f"cannot read {path}: {first_line(error).rstrip('.')}.") from error


def parse_keys(document: bytes, store: UPath) -> list[ApiKey]:
    """The keys that a document tells of.

    Raises:
        ClusterError: it is damaged.
    """
    if not document:
        return []
    try:
        return _Document.model_validate_json(document).keys
    except ValidationError as error:
        found = error.errors(include_input=False)[0]
        where = ".".join(map(str, found["loc"]))
        raise ClusterError(f"{store / KEYS} is damaged: {where}{': ' if where else ''}{found['msg']}.") from None


def create_key(
    store: UPath,
    name: str,
    scopes: Sequence[str] = ("classify",),
    *,
    lifetime: timedelta | None = None,
    rate: float | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[ApiKey, str]:
    """Makes a key; returns what is kept of it, and the key itself, which is nowhere else.

    Args:
        store: the store's root.
        name: whose it is or what for; only people read it.
        scopes: what it allows.
        lifetime: after which it expires.
        rate: requests a second of its own.
        tell: told when another process is at work on the keys and this one waits.

    Raises:
        InputError: a name, scope or rate that cannot be.
        ClusterError: the store cannot be read or written.
    """
    if not name.strip() or not name.isprintable() or len(name) > 100:
        raise InputError("a key's NAME must be 1 to 100 printable characters, for example the team that will use it.")
    if unknown := [each for each in scopes if each not in SCOPES]:
        raise InputError(f"{unknown[0]!r} is no scope of a key; there are {', '.join(SCOPES)}.")
    if rate is not None and not (rate > 0 and math.isfinite(rate)):
        raise InputError(f"a key's rate is {rate:g}, but must be a number of requests a second above 0.")
    now = datetime.now(UTC).replace(microsecond=0)
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    with _changing(store, tell) as keys:
        taken = {each.id for each in keys}
        its_id = next(each for each in iter(lambda: secrets.token_hex(4), "") if each not in taken)
        key = ApiKey(
            id=its_id,
            name=name.strip(),
            sha256=hashlib.sha256(secret.encode()).hexdigest(),
            scopes=tuple(each for each in SCOPES if each in scopes),
            created=now,
            expires=now + lifetime if lifetime else None,
            rate=rate,
        )
        keys.append(key)
    return key, f"{PREFIX}{its_id}_{secret}"


def revoke_key(store: UPath, its_id: str, *, tell: Callable[[str], None] = lambda _: None) -> ApiKey:
    """Revokes a key for ever; one that was revoked before stays as it is.

    Raises:
        InputError: there is no such key.
        ClusterError: the store cannot be read or written.
    """
    with _changing(store, tell) as keys:
        for position, key in enumerate(keys):
            if key.id == its_id:
                if key.revoked is None:
                    now = datetime.now(UTC).replace(microsecond=0)
                    keys[position] = key = key.model_copy(update={"revoked": now})
                return key
        known = "; `shoal keys list` lists them" if keys else ""
        # What was given may be a whole key, by mistake.
        raise InputError(f"{store} has no key with the id {its_id[:8]!r}{known}.")


def parse_lifetime(text: str) -> timedelta:
    """`90d`, `12h`, `30m` or `2w` as a span of time.

    Raises:
        InputError: it is none, or longer than a century.
    """
    found = re.fullmatch(r"([0-9]{1,6})([mhdw])", text.strip())
    lifetime = timedelta(seconds=int(found[1]) * _UNITS[found[2]]) if found else timedelta()
    if not timedelta() < lifetime <= _LONGEST:
        raise InputError(f"{text!r} is no lifetime of a key; write minutes, hours, days or weeks: 30m, 12h, 90d, 2w.")
    return lifetime


@contextmanager
def _changing(store: UPath, tell: Callable[[str], None]) -> Iterator[list[ApiKey]]:
    """The keys, to change while the block runs and written after it; one process at a time changes them."""
    path = store / KEYS
    with claimed(path.with_suffix(""), tell):
        keys = read_keys(store)
        before = list(keys)
        yield keys
        if keys != before:
            with telling_storage_errors(str(path), "--store PATH"):
                write_whole(path, _Document(keys=keys).model_dump_json(indent=2) + "\n")
