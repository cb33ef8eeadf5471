"""Losses that jump: told at once, for they point to rows or to a learning rate that harm a run."""

from collections import deque
from statistics import median

_WINDOW, _LEAST = 64, 16
_DEVIATIONS = 8.0


class Spikes:
    """Compares each step's loss with the last 64: their median, and how far they usually lie from it.

    The median absolute deviation (Hampel 1974) is used, which a spike itself does not widen. A restart forgets.
    """

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=_WINDOW)

    def above(self, loss: float) -> float | None:
        """The usual loss where this one is far above it, else None."""
        usual = None
        if len(self._seen) >= _LEAST:
            middle = median(self._seen)
            deviation = 1.4826 * median(abs(each - middle) for each in self._seen)
            if loss > middle + max(_DEVIATIONS * deviation, 0.1 * abs(middle)):
                usual = middle
        self._seen.append(loss)
        return usual
