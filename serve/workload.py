"""What an engine has had to do and how fast it is: what the wait for it and the number of replicas are told by."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine has had to do since it was last asked."""

    queued_tokens: int
    """Waiting or computed now."""
    tokens_per_second: float
    """That the engine computes when all its lanes do; 0 before its first batch."""
    busy: float
    """The share of the time that it computed, of all lanes."""
    refused_per_second: float
    """Tokens of requests that were sent away, by the mean of those that were not."""
    requests: int
    """Requests that are in progress now or have come since, explanations and those sent away included."""


class Workload:
    """Counts, for one queue whose batches are computed in `lanes` at once; in the thread of its event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, lanes: int = 1) -> None:
        self._clock = clock
        self._lanes = lanes
        self.queued_tokens = 0
        """Of texts that wait or are computed now."""
        self.tokens_per_second = 0.0
        """That the engine computes when all its lanes do; 0 before its first batch."""
        self._since = clock()
        self._busy_s = 0.0
        self._refused = 0
        self._came = 0
        self._submitted = 0
        self._submitted_tokens = 0

    @property
    def wait_s(self) -> float:
        """The seconds that a text which comes now will wait, as far as can be told."""
        return self.seconds_for(self.queued_tokens)

    def seconds_for(self, tokens: int, texts: int | None = None) -> float:
        """How long they take to compute, in so many texts or in many; 0 as long as that is not known."""
        lanes = self._lanes if texts is None else min(texts, self._lanes)
        return tokens / (self.tokens_per_second * lanes / self._lanes) if self.tokens_per_second else 0.0

    def came(self) -> None:
        """A request has come, whatever becomes of it."""
        self._came += 1

    def refused(self, requests: int = 1) -> None:
        """Requests were sent away."""
        self._refused += requests

    def submitted(self, tokens: int) -> None:
        """A request's texts begin to wait."""
        self._submitted, self._submitted_tokens = self._submitted + 1, self._submitted_tokens + tokens
        self.queued_tokens += tokens

    def left(self, tokens: int) -> None:
        """They are answered, or wanted no more."""
        self.queued_tokens -= tokens

    def computed(self, tokens: int, seconds: float) -> None:
        """A batch took one lane so long."""
        self._busy_s += seconds / self._lanes
        speed = self._lanes * tokens / max(seconds, 1e-6)
        self.tokens_per_second = 0.8 * self.tokens_per_second + 0.2 * speed if self.tokens_per_second else speed

    def load(self, requests: int) -> Load:
        """What there was to do since the last call; `requests` are in progress now."""
        now = self._clock()
        passed = max(now - self._since, 1e-3)
        mean = self._submitted_tokens / self._submitted if self._submitted else 0.0
        busy, refused = min(self._busy_s / passed, 1.0), self._refused * mean / passed
        found = Load(self.queued_tokens, self.tokens_per_second, busy, refused, requests + self._came)
        self._since, self._busy_s, self._refused, self._came = now, 0.0, 0, 0
        return found
