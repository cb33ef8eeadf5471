"""Tokens (JWT) of an identity provider: signed by one of its published keys, for us, and of now.

Only signatures by a key pair are taken: with a shared secret whoever can verify could also sign.
"""

import asyncio
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
from jwt import PyJWK, PyJWKClient, PyJWKSet
from jwt.exceptions import PyJWTError

from cluster.store import ClusterError
from models.settings import first_line
from serve.access import SCOPES, Caller, unauthorized
from serve.logs import logger
from serve.problems import ProblemError
from serve.security_settings import JwtSettings

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")

RETRY_S = 30.0
"""Keys are not fetched more often than this, whatever tokens come."""
LIFETIME_S = 300.0
"""After which they are fetched again, so that one that was withdrawn is taken no longer."""

_FETCH_TIMEOUT_S = 5.0
_REMEMBERED = 4096
_SENTENCES: dict[type[PyJWTError], str] = {
    jwt.ExpiredSignatureError: "The token has expired; get a new one.",
    jwt.ImmatureSignatureError: "The token is not valid yet.",
    jwt.InvalidAudienceError: "The token is meant for another audience than this endpoint.",
    jwt.InvalidIssuerError: "The token comes from another issuer than this endpoint trusts.",
    jwt.MissingRequiredClaimError: "The token must have the claims exp, iss and aud.",
}

_log = logger("tokens")


class SigningKeys:
    """The issuer's public keys, fetched again when they are old or a token names another.

    Where they cannot be fetched, those last known stay, and the log says so.
    """

    def __init__(self, settings: JwtSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._tried = -math.inf
        self._lock = asyncio.Lock()
        self.known: dict[str | None, PyJWK] = {}
        """By key id; replaced as a whole. A single key also answers for tokens that name none."""

    def old(self) -> bool:
        """Whether it is time to fetch them again."""
        return self._clock() - self._tried >= LIFETIME_S

    async def find(self, kid: str | None) -> PyJWK | None:
        """The key of that id; fetches where need be, and meanwhile only those wait who need it."""
        if kid not in self.known or (self.old() and not self._lock.locked()):
            async with self._lock:
                if self._clock() - self._tried >= (LIFETIME_S if kid in self.known else RETRY_S):
                    await asyncio.to_thread(self.refresh)
        return self.known.get(kid)

    def refresh(self) -> None:
        """Fetches them once."""
        self._tried = self._clock()
        try:
            self.known = fetch(self._settings)
        except ClusterError as error:
            _log.warning("%s", error)


def fetch(settings: JwtSettings) -> dict[str | None, PyJWK]:
    """The issuer's public keys by their ids.

    Raises:
        ClusterError: they cannot be had, or there is none that could have signed a token.
    """
    where = settings.jwks_url or settings.jwks_file or ""
    try:
        if settings.jwks_file is not None:
            found = PyJWKSet.from_json(Path(settings.jwks_file).read_text(encoding="utf-8"))
        else:
            client = PyJWKClient(where, cache_jwk_set=False, timeout=_FETCH_TIMEOUT_S)
            found = PyJWKSet.from_dict(client.fetch_data())
    except (PyJWTError, OSError, ValueError, AttributeError) as error:  # also of JSON of another shape
        raise ClusterError(f"cannot get the issuer's keys from {where}: {first_line(error).rstrip('.')}.") from error
    usable = [key for key in found.keys if key.algorithm_name in ALGORITHMS and key.public_key_use in (None, "sig")]
    if not usable:
        raise ClusterError(f"{where} holds no public key that signs tokens (RSA, EC or Ed25519).")
    return {key.key_id: key for key in usable} | ({None: usable[0]} if len(usable) == 1 else {})


class TokenVerifier:
    """Says who shows a token.

    A token that was found valid is remembered by its digest, as long as the issuer's keys are the same: verifying a
    signature takes ten times what all else takes that is asked of a request here.
    """

    def __init__(self, settings: JwtSettings, signing: SigningKeys) -> None:
        self._settings = settings
        self._signing = signing
        self._remembered: dict[bytes, Caller] = {}
        self._by = signing.known

    async def caller(self, token: bytes) -> Caller:
        """Who shows this token; whoever asks must still look at when it expires.

        Raises:
            ProblemError: 401, it is not valid; 503, the issuer's keys could not be had yet.
        """
        digest = hashlib.sha256(token).digest()
        if self._by is self._signing.known and not self._signing.old() and (seen := self._remembered.get(digest)):
            return seen
        caller = await self._verified(token)
        if self._by is not self._signing.known or len(self._remembered) >= _REMEMBERED:
            self._by, self._remembered = self._signing.known, {}
        self._remembered[digest] = caller
        return caller

    async def _verified(self, token: bytes) -> Caller:
        settings = self._settings
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            key = await self._signing.find(kid)
            if key is None and not self._signing.known:
                sentence = "The token issuer's keys cannot be had at the moment; try again."
                raise ProblemError(503, sentence, {"Retry-After": f"{RETRY_S:.0f}"})
            if key is None:
                raise unauthorized("The token is signed by a key that its issuer does not publish.", "invalid_token")
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=settings.leeway_s,
                options={"require": ["exp", "iss", "aud"]},
            )
        except (PyJWTError, ValueError, RecursionError) as error:
            told = next((told for kind, told in _SENTENCES.items() if isinstance(error, kind)), None)
            raise unauthorized(told or "This is no valid token.", "invalid_token") from None
        named = next((claims[each] for each in ("sub", "client_id", "azp") if claims.get(each)), "")
        return Caller(
            f"token {named}", _scopes(claims.get(settings.scope_claim)), float(claims["exp"]) + settings.leeway_s
        )


def _scopes(claim: Any) -> frozenset[str]:
    words = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else []
    return frozenset(SCOPES).intersection(word for word in words if isinstance(word, str))
