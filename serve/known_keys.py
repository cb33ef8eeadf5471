"""The API keys as a running replica knows them: the store's document, read anew every few seconds."""

import hashlib
import hmac
import math
import threading
import time

from upath import UPath

from cluster.store import ClusterError
from serve.access import Caller, unauthorized
from serve.keys import PREFIX, ApiKey, parse_keys, read_document
from serve.logs import logger

READ_EVERY_S = 2.0
"""So a key that was revoked is refused, and a new one is taken, well within 5 s."""

_PREFIX = PREFIX.encode()
_LONGEST = 200
_NOBODY = bytes(32)
_WRONG = "This is no valid API key."

_log = logger("keys")


class KnownKeys:
    """The keys of a store.

    A document that cannot be read, or is damaged, leaves those last known as they are, and the log says so. One that
    was removed holds none.

    Raises:
        ClusterError: it cannot be read at first, when none is known yet.
    """

    def __init__(self, store: UPath) -> None:
        self._store = store
        self._document = read_document(store)
        self._known = {key.id.encode(): _Known(key) for key in parse_keys(self._document, store)}
        self._reads = True

    def start(self) -> None:
        """Reads the document anew from now on, in a thread that ends with the process."""
        threading.Thread(target=self._watch, name="keys", daemon=True).start()

    def read(self) -> None:
        """Reads the document once."""
        try:
            document = read_document(self._store)
            if document != self._document:
                self._known = {key.id.encode(): _Known(key) for key in parse_keys(document, self._store)}
                self._document = document
        except ClusterError as error:
            if self._reads:
                _log.warning("%s The API keys last known stay valid until it can be read.", error)
            self._reads = False
        else:
            if not self._reads:
                _log.warning("The API keys in %s can be read again.", self._store)
            self._reads = True

    def caller(self, presented: bytes) -> Caller:
        """Who shows this key. The time it takes does not tell how much of a secret is right.

        Raises:
            ProblemError: 401, it is none of the store's, or was revoked.
        """
        its_id, _, secret = presented[len(_PREFIX) :].partition(b"_")
        if not presented.startswith(_PREFIX) or len(presented) > _LONGEST:
            raise unauthorized(_WRONG, "invalid_token")
        known = self._known.get(its_id)
        digest = hashlib.sha256(secret).digest()
        if not hmac.compare_digest(digest, known.digest if known else _NOBODY) or known is None:
            raise unauthorized(_WRONG, "invalid_token")
        if known.revoked:
            raise unauthorized("This API key was revoked; ask for a new one.", "invalid_token")
        return known.caller

    def _watch(self) -> None:
        while True:
            time.sleep(READ_EVERY_S)
            try:
                self.read()
            except Exception:  # whatever a store's library may raise; the next round tries again
                _log.warning("cannot read the API keys; those last known stay valid", exc_info=True)


class _Known:
    """A key, ready to be compared."""

    __slots__ = ("caller", "digest", "revoked")

    def __init__(self, key: ApiKey) -> None:
        self.digest = bytes.fromhex(key.sha256)
        self.revoked = key.revoked is not None
        expires = key.expires.timestamp() if key.expires else math.inf
        self.caller = Caller(f"key {key.id}", frozenset(key.scopes), expires, key.rate)
