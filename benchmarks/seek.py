"""Finding a step in the plan of a very large training set.

    python benchmarks/seek.py    # a second

Prints how long it takes until all lanes know their rows at step 1,000,000 of an epoch of a billion rows, and the memory
that the process took for it, Python and numpy included.
"""

import resource
import statistics
import time

import numpy as np

from models.feed import Feed

PLAN = Feed(rows=10**9, chunk_rows=4096, lanes=8, microbatch=32, seed=0)
STEP, TIMES = 1_000_000, 5


def seek(epoch: int) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    for lane in range(PLAN.lanes):
        place = PLAN.place(epoch, STEP, lane)
        assert place
        lengths = np.full(PLAN.chunk_size(place.chunk), 40)
        PLAN.chunk_order(epoch, place.chunk, lengths)[place.start : place.stop]
    return (time.perf_counter() - started) * 1000


def main() -> None:
    """Measures, and prints the machine with it."""
    first, *others = (seek(epoch) for epoch in range(TIMES))
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    from machine import describe_machine  # Not before: it is not part of what is measured.

    print(describe_machine())
    print(
        f"Step {STEP:,} of {PLAN.steps:,} in an epoch of {PLAN.rows:,} rows, {PLAN.lanes} lanes of {PLAN.microbatch}: "
        f"{first:.1f} ms at first, {statistics.median(others):.1f} ms in other epochs; {megabytes:.0f} MB of memory."
    )


if __name__ == "__main__":
    main()
