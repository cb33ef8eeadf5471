"""Draws docs/ladder.svg: the learning rate of a trial on the way to each of its rungs."""

from pathlib import Path

from models.optimizer import wsd_rate
from pipelines.figures import curves
from pipelines.sweeping.ladder import ladder


def draw() -> str:
    """The picture."""
    steps, warmup = 1000, 0.1
    series = {}
    for number, rung in enumerate(ladder(steps, warmup, 0.2, 3, 3.0)):
        first = 0 if number == 2 else rung.fork
        points = [
            (float(step), wsd_rate(step, round(steps * warmup), rung.fork, rung.end))
            for step in range(first, rung.end + 1)
        ]
        series["trunk, and rung 3: the full run" if number == 2 else f"branch of rung {number + 1}"] = points
    order = sorted(series, key=lambda name: "trunk" not in name)
    return curves({name: series[name] for name in order}, "steps", "learning rate / peak")


if __name__ == "__main__":
    (Path(__file__).parent / "ladder.svg").write_text(draw(), encoding="utf-8")
