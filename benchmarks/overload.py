"""An endpoint under ten times the load that it can carry, for a minute, and how soon it is itself again afterwards.

    python benchmarks/overload.py

Goodput is what is answered with 200, in requests a second: at the rate up to which the 99th percentile is under the
limit, then under ten times as much. The rest has to be shed with 429. When the overload ends, 30% of the rate that it
can carry goes on, and it is told after how many seconds the 99th percentile is within the limit for good. Load comes
from another process of the same machine, which takes its part of the processors.
"""

import argparse
import json
import time

from endpoints import (
    highest_rate,
    load_result,
    model_folder,
    plain_ray,
    run_load,
    running,
    settled,
    shoal,
    start_load,
    tweets,
    windows,
    write_bodies,
)
from machine import describe_machine
from rich.console import Console
from rich.table import Table

AFTER_S = 15


def main() -> None:
    """Measures Shoal beside plain Ray Serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="A part of the names to measure.")
    parser.add_argument("--limit-ms", type=float, default=100.0, help="The 99th percentile allowed.")
    parser.add_argument("--times", type=float, default=10.0, help="The overload, in times of what it can carry.")
    parser.add_argument("--seconds", type=float, default=60.0, help="Of overload.")
    given = parser.parse_args()
    console = Console()
    table = Table("", "carries, 1/s", "goodput at 1.3 times", "goodput at ten times", "statuses", "p99, ms", "back, s")
    with model_folder() as folder:
        for server in (shoal("onnx"), plain_ray()):
            if given.only and given.only not in server.name:
                continue
            with running(server, folder) as url:
                bodies = write_bodies(folder / "bodies.jsonl", server, tweets(512))
                run_load(url, bodies, 20, 3)
                carries = highest_rate(url, bodies, 60, given.limit_ms, 6)
                peak = run_load(url, bodies, 1.3 * carries, 10)
                overload = start_load(url, bodies, given.times * carries, given.seconds)
                time.sleep(given.seconds)
                after = start_load(url, bodies, 0.3 * carries, AFTER_S, folder / "after.json")
                under, _ = load_result(overload), load_result(after)
                back = settled(windows(folder / "after.json", AFTER_S), given.limit_ms)
            table.add_row(
                server.name,
                f"{carries:,.0f}",
                f"{peak['answered_per_second']:,.0f}",
                f"{under['answered_per_second']:,.0f}",
                json.dumps(under["statuses"]),
                f"{under['p99_ms'] or 0:,.0f}",
                f"more than {AFTER_S}" if back is None else f"{back:g}",
            )
    console.print(describe_machine())
    console.print(table)


if __name__ == "__main__":
    main()
