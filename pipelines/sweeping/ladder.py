"""The rungs of a trial: where it is scored, so that scores of one rung compare like with like.

A full run of N steps warms up over the first of them, then keeps its rate, then decays to nothing over the last share
(warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395; Hagele et al. 2024, arXiv 2405.18392). A rung is such a run
with the same warm-up and fewer steps after it: its decay is a branch off the same stable trunk. So the trunk of a trial
does not depend on where it is stopped, a score is that of a finished, decayed run of its budget, and what a rung costs
beyond the trunk is its decay.

Budgets are equal where the steps weigh equal: one of the warm-up counts by its share of the peak rate, a half on
average. Counting all of them would take a long warm-up for a bad rate; counting none would give it more training.

        rate  ________________________________________
             /            \\           \\               \\
            /              \\ rung 1    \\ rung 2        \\ rung 3: the full run
           /________________\\___________\\_______________\\___ steps
"""

from dataclasses import dataclass

from models.optimizer import wsd_fork


@dataclass(frozen=True)
class Rung:
    """A place to score a trial at."""

    number: int
    """From 1; the full run has the highest one, whichever of the lower ones a trial has."""
    fork: int
    """Steps of the trunk, after which the branch decays."""
    end: int
    """Steps of a run that ends here: what the score is worth."""


def ladder(steps: int, warmup: float, decay: float, rungs: int, reduction: float) -> list[Rung]:
    """The rungs of a run of `steps`, the last one the full run; each has `reduction` times the one before's budget.

    A rung has at least half of its share of the steps after the warm-up, which is a share of the full run's steps and
    the same for all. Of rungs of short runs that would fall together only the highest is there.
    """
    warm = round(steps * warmup)
    found: list[Rung] = []
    for place in range(rungs):
        share = reduction**-place
        equal = warm / 2 + (steps - warm / 2) * share
        end = min(max(round(equal), round(warm + (steps - warm) * share / 2), warm + 1), steps)
        rung = Rung(rungs - place, max(wsd_fork(warm, end, decay), 0), end)
        if not found or (rung.end < found[-1].end and rung.fork < found[-1].fork):
            found.append(rung)
    return found[::-1]
