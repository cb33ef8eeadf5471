"""How often each client may ask: a token bucket for each, kept as one number.

A bucket that holds `burst` requests and is filled at `rate` a second is full again at some moment; that moment says how
full it is now, and is all that is kept (the generic cell rate algorithm, ITU-T I.371: a bucket in another form). A
client that was never seen, or whose bucket is full again, needs no entry.
"""

import math
import time
from collections.abc import Callable

from serve.problems import ProblemError

_ENTRIES = 10_000
"""Above so many clients, those whose buckets are full again are forgotten."""


class TokenBuckets:
    """The buckets of all clients of one process.

    Memory: an entry for each client that has asked within the time in which its bucket fills.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_at: dict[str, float] = {}
        self._most = _ENTRIES

    def take(self, client: str, rate: float, burst: float) -> float:
        """Takes one request of the client's bucket; the seconds until there is one to take, 0 where it was taken.

        Args:
            client: names the bucket.
            rate: requests a second.
            burst: requests that a full bucket holds, 1 at least.
        """
        now = self._clock()
        full_at = max(self._full_at.get(client, now), now) + 1 / rate
        wait = full_at - now - burst / rate
        if wait > 1e-9:  # Less is rounding.
            return wait
        self._full_at[client] = full_at
        if len(self._full_at) > self._most:
            self._full_at = {each: moment for each, moment in self._full_at.items() if moment > now}
            self._most = max(_ENTRIES, 2 * len(self._full_at))
        return 0.0

    def limit(self, client: str, rate: float, burst: float | None = None) -> None:
        """Takes one request of the client's bucket; without `burst` it holds those of one second, at least one.

        Raises:
            ProblemError: 429, it is empty; `Retry-After` says when to come again.
        """
        wait = self.take(client, rate, burst or max(1.0, rate))
        if wait:
            seconds = math.ceil(wait)
            sentence = f"That is more than {rate:g} requests a second; try again in {seconds} s."
            raise ProblemError(429, sentence, {"Retry-After": str(seconds)})
