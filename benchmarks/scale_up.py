"""A step in the load of an endpoint with one replica: after how many seconds a second one has it under control.

    python benchmarks/scale_up.py

One replica carries 30% of what it can for a while; then comes more than it can carry, and less than two can. Told is
after how many seconds the 99th percentile of the latencies is within the limit for the next 15 s: scaled by Shoal's
tokens, and the same endpoint by Ray Serve's default policy (requests in progress), each with its own defaults. The
requests are lists of 32 texts: of single ones, two replicas on the two cores of a small machine hardly carry more than
one, since what is not the engine takes the second core.
"""

import argparse
import json

from endpoints import (
    highest_rate,
    load_result,
    model_folder,
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

LIST = 32
HOLD_S = 15.0


def main() -> None:
    """Measures both ways to scale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-ms", type=float, default=1000.0, help="The 99th percentile allowed.")
    parser.add_argument("--step", type=float, default=1.4, help="The load in times of what one replica carries.")
    parser.add_argument("--seconds", type=float, default=120.0, help="Of the step.")
    parser.add_argument("--carries", type=float, help="Lists/s that one replica carries, where they are known.")
    given = parser.parse_args()
    console = Console()
    table = Table("scaled by", "within the limit after, s", "answered with 200", "others")
    with model_folder() as folder:
        bodies = write_bodies(folder / "bodies.jsonl", shoal("onnx"), tweets(512), LIST)
        carries = given.carries
        if carries is None:
            with running(shoal("onnx", least=1, most=1), folder) as url:
                run_load(url, bodies, 1, 3)
                carries = highest_rate(url, bodies, 2, given.limit_ms, 10)
        console.print(f"one replica carries {carries:,.1f} lists/s", style="dim")
        for policy, name in (("tokens", "tokens (Shoal)"), ("default", "requests in progress (Ray's default)")):
            with running(shoal("onnx", least=1, most=2, policy=policy), folder) as url:
                run_load(url, bodies, 0.3 * carries, 15)
                step = start_load(url, bodies, given.step * carries, given.seconds, folder / "step.json")
                statuses = load_result(step)["statuses"]
            after = settled(windows(folder / "step.json", given.seconds), given.limit_ms, hold_s=HOLD_S)
            good = statuses.pop("200", 0)
            table.add_row(name, "not at all" if after is None else f"{after:g}", f"{good:,}", json.dumps(statuses))
    console.print(describe_machine())
    console.print(f"one replica carries {carries:,.1f} lists/s; the step is {given.step:g} times one")
    console.print(table)


if __name__ == "__main__":
    main()
