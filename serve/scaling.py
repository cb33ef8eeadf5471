"""How many replicas: from the tokens that wait and how fast they are computed, not from the number of requests.

A request may hold one word or 256 pages; tokens are what costs. Ray Serve asks each replica for its load every moment
(`Classifier.record_autoscaling_stats`) and this policy for the replicas wanted; Ray keeps to the bounds and the
delays of the settings, and asks it in its controller's process.

Where no replica runs, nobody tells of tokens: a request then waits in Ray's own proxy, and Ray starts a replica for it
without asking here.
"""

from collections.abc import Mapping
from typing import Any

QUEUED, SPEED, BUSY, REFUSED = "queued_tokens", "tokens_per_second", "busy", "refused_per_second"
REQUESTS = "requests"
"""What a replica tells: see `serve.batching.Load`."""


def replicas_for(queued: float, per_second: float, speed: float, *, target_wait_s: float, target_busy: float) -> float:
    """The replicas that keep up with `per_second` tokens, each `target_busy` of its time, and clear the queue in time.

    Args:
        queued: tokens that wait.
        per_second: tokens that come each second, those of requests that are sent away included.
        speed: tokens that a replica computes in a second.
        target_wait_s: the seconds in which the queue is to be gone.
        target_busy: the share of its time that a replica may compute.
    """
    return (per_second + queued / target_wait_s) / (speed * target_busy)


class TokenPolicy:
    """Ray Serve's autoscaling policy."""

    def __init__(self, target_wait_s: float, target_busy: float) -> None:
        self._target_wait_s = target_wait_s
        self._target_busy = target_busy

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The replicas wanted, before bounds and delays.

        None where no request is there or has come lately, at least one where there is, and as many as there are while
        no replica has told anything, or there are requests but none has computed anything.
        """
        told: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        # Those that wait in Ray's proxy have not reached a replica yet.
        asked = sum(told.get(REQUESTS, {}).values()) > 0 or context.total_queued_requests > 0
        speeds = {replica: speed for replica, speed in told.get(SPEED, {}).items() if speed > 0}
        if not speeds:
            return float(context.target_num_replicas if asked or not told.get(SPEED) else 0), {}
        busy = told.get(BUSY, {})
        computed = sum(speed * busy.get(replica, 0.0) for replica, speed in speeds.items())
        wanted = replicas_for(
            sum(told.get(QUEUED, {}).values()),
            computed + sum(told.get(REFUSED, {}).values()),
            sum(speeds.values()) / len(speeds),
            target_wait_s=self._target_wait_s,
            target_busy=self._target_busy,
        )
        return max(wanted, 1.0) if asked else wanted, {}
