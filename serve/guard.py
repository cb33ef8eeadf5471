"""Whether a request is let in: its key or token, what that allows, and how often it comes."""

import functools
import ipaddress
import os
import time
from collections.abc import Callable, Iterable

from starlette.types import Scope
from upath import UPath

from models.settings import InputError
from serve.access import Caller, is_open, scope_of, unauthorized
from serve.keys import PREFIX
from serve.known_keys import KnownKeys
from serve.problems import ProblemError
from serve.rates import TokenBuckets
from serve.requests import record_of
from serve.security_settings import ExposureSettings
from serve.settings import ServeSettings
from serve.tokens import SigningKeys, TokenVerifier

SETTINGS_VARIABLE = "SHOAL_SERVE_SETTINGS"
"""The environment variable in which a replica finds its ServeSettings as JSON."""
STORE_VARIABLE = "SHOAL_SERVE_STORE"
"""That in which it finds the store, which has the API keys and takes samples."""

_PREFIX = PREFIX.encode()
_BEARER = b"bearer "
CREDENTIALS = (b"authorization", b"x-api-key")


class Guard:
    """Lets requests in or refuses them, as the settings say.

    Args:
        settings: what is demanded.
        keys: the API keys; None where none are taken.
        tokens: verifies tokens; None where none are taken.
        buckets: how often each client has asked.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        settings: ExposureSettings,
        keys: KnownKeys | None = None,
        tokens: TokenVerifier | None = None,
        buckets: TokenBuckets | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._tokens = tokens
        self._rate = settings.rate
        self._buckets = buckets or TokenBuckets()
        self._now = now
        what = " or ".join([*(["an API key"] if keys else []), *(["a token"] if tokens else [])])
        self._missing = f"This needs {what}: send the header `Authorization: Bearer ...`."

    async def admit(self, scope: Scope) -> None:
        """Returns if the request may go on.

        Raises:
            ProblemError: 401 without a valid key or token, 403 if it does not allow this, 429 if it comes too often.
        """
        path: str = scope["path"]
        if is_open(scope["method"], path):
            return
        if self._keys is None and self._tokens is None:
            if self._rate:
                client = scope.get("client")
                self._buckets.limit(
                    network_of(client[0]) if client else "", self._rate.requests_per_second, self._rate.burst
                )
            return
        caller = await self._caller(scope["headers"])
        record_of(scope).client = caller.identity
        if caller.expires <= self._now():
            raise unauthorized(f"The {caller.identity.split()[0]} has expired; get a new one.", "invalid_token")
        wanted = scope_of(path)
        if not caller.may(wanted):
            sentence = f"This key or token does not allow {path}: it needs the scope {wanted}."
            header = f'Bearer error="insufficient_scope", scope="{wanted}"'
            raise ProblemError(403, sentence, {"WWW-Authenticate": header})
        if caller.rate is not None:
            self._buckets.limit(caller.identity, caller.rate)
        elif self._rate is not None:
            self._buckets.limit(caller.identity, self._rate.requests_per_second, self._rate.burst)

    async def _caller(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        bearer = key = None
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == _BEARER:
                bearer = value[7:].strip()
            elif name == b"x-api-key":
                key = value.strip()
        presented = bearer or key
        if not presented:
            raise unauthorized(self._missing)
        if self._keys is not None and (presented.startswith(_PREFIX) or not (bearer and self._tokens)):
            return self._keys.caller(presented)
        if bearer and self._tokens is not None:
            return await self._tokens.caller(bearer)
        raise unauthorized(self._missing, "invalid_token")


@functools.lru_cache(4096)
def network_of(address: str) -> str:
    """By what an anonymous client is told from others: its address, or in IPv6 the network (/64) that is its own."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    return str(found.ipv4_mapped or ipaddress.ip_network((found.packed, 64), strict=False))


def make_guard(settings: ExposureSettings, store: UPath | None) -> Guard | None:
    """The guard that the settings ask for, which goes on reading the store's keys; None where nothing is demanded.

    Raises:
        ClusterError: the store's keys cannot be read.
        InputError: keys are demanded, but there is no store that could hold them.
    """
    if not settings.guarded and settings.rate is None:
        return None
    keys = tokens = None
    if settings.accepts_keys:
        if store is None:
            raise InputError("serve.keys demands API keys, but this endpoint was given no store that holds them.")
        keys = KnownKeys(store)
        keys.start()
    if settings.jwt is not None:
        signing = SigningKeys(settings.jwt)
        signing.refresh()
        tokens = TokenVerifier(settings.jwt, signing)
    return Guard(settings, keys, tokens)


@functools.cache
def process_guard() -> Guard | None:
    """The one guard of this replica, made as its environment says."""
    return make_guard(ServeSettings.model_validate_json(os.environ[SETTINGS_VARIABLE]), process_store())


def process_store() -> UPath | None:
    """The store that this replica was given."""
    store = os.environ.get(STORE_VARIABLE)
    return UPath(store) if store else None
