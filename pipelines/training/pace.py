"""How often to take a checkpoint: what it costs against what a failure would lose."""

import math
from dataclasses import dataclass

PRIOR_SECONDS = 3600.0
"""Time between failures that is supposed before there have been any."""
_LARGEST_SHARE = 0.02


@dataclass
class Pace:
    """The interval between checkpoints, in seconds, after Young (1974) and Daly (2006).

    With a checkpoint's cost C and a mean time between failures M the least time is lost at sqrt(2 C M) - C. It is kept
    within the recipe's bounds, and, as far as these allow, such that checkpoints take at most 2% of the time.
    """

    least: float
    most: float
    failures: int = 0
    """Of the whole run, by now."""
    seconds: float = 0.0
    """That the whole run has taken, by now."""
    cost: float | None = None
    """Of the last checkpoint; None before there was one, when the next comes after `least` to find out."""

    @property
    def interval(self) -> float:
        """Seconds from one checkpoint to the next."""
        if self.cost is None:
            return self.least
        between = (self.seconds + PRIOR_SECONDS) / (self.failures + 1)
        best = math.sqrt(2 * self.cost * between) - self.cost
        return min(max(best, self.cost / _LARGEST_SHARE, self.least), self.most)
