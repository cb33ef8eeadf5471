"""Recovery from a lost node: Shoal beside an elastic Ray Train script as Ray's documentation shows it.

    PYTHONPATH=. python benchmarks/elastic.py [--picture losses.svg]    # about 20 minutes on 2 cores

Each trains the same encoder on the same texts on a cluster of three nodes (raylets of this host) with room for one
worker each. In the middle of the second epoch a node is killed: its raylet and all that runs on it. Prints the seconds
until the next optimizer step, how much was lost, and how long until the run was as far again; draws the losses of both
over time. The plain script (`plain_elastic.py`) has Ray's own settings, Shoal those of `cluster/connect.py`.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.connect import ENVIRONMENT, UNWATCHED

if "shoal" in sys.argv:  # Ray's processes, and some of its modules, read these when they start.
    os.environ |= ENVIRONMENT | UNWATCHED
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}

import plain_elastic
import ray
from machine import describe_machine
from plain_elastic import BATCH, EPOCHS, NODES, RATE
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util
from upath import UPath

from cluster.store import Artifact, Store
from pipelines import finetune
from pipelines.figures import curves
from pipelines.finetune import FinetuneSettings
from pipelines.prepared import Prepared
from pipelines.pretrained import encoder_folder
from pipelines.progress import Progress
from pipelines.stage import Task, complete
from recipes.loading import load_recipe
from recipes.planning import plan
from tests.pipelines.playground import Playground

RECIPE = Path(__file__).parent.parent / "recipes" / "airline.yaml"
LANES, KILL_AT, SMOOTH = 4, 1.5, 16
_UNDER_WAY_SECONDS = 2.0
CONTESTANTS = {"plain": "Ray Train, elastic, as documented", "shoal": "Shoal"}


@dataclass(frozen=True)
class Step:
    """An optimizer step: when it was over, how many epochs were then done, its loss."""

    time: float
    epochs: float
    loss: float


@dataclass(frozen=True)
class Recovery:
    """What killing a node cost a contestant."""

    killed: float
    furthest: float
    """Epochs that were done before."""
    steps: list[Step]

    @property
    def after(self) -> list[Step]:
        """Steps of the workers that went on; the others' last one may have been under way."""
        return [step for step in self.steps if step.time > self.killed + _UNDER_WAY_SECONDS]

    @property
    def seconds(self) -> float:
        """From the kill to the next optimizer step."""
        return self.after[0].time - self.killed

    @property
    def lost(self) -> float:
        """Epochs that were done again."""
        return max(self.furthest - self.after[0].epochs, 0.0)

    @property
    def until_as_far(self) -> float:
        """From the kill until the run was as far as it had been."""
        return next(step.time for step in self.after if step.epochs >= self.furthest) - self.killed


def main() -> None:
    """Runs both and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="write the losses over time there, as SVG")
    parser.add_argument("--keep", type=Path, help="leave what was measured there; what is there is not measured again")
    parser.add_argument("--contestant", choices=tuple(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contest(options.contestant, options.folder)
        sys.stdout.flush()
        os._exit(0)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        found = {name: _alone(name, options.keep or Path(folder)) for name in CONTESTANTS}
    _print(found)
    if options.picture:
        series = {
            CONTESTANTS[name]: _smoothed([(step.time - one.steps[0].time, step.loss) for step in one.steps])
            for name, one in found.items()
        }
        marks = [one.killed - one.steps[0].time for one in found.values()]
        options.picture.write_text(curves(series, "seconds", "loss", marks), encoding="utf-8")


def _alone(name: str, folder: Path) -> Recovery:
    """A contestant in a process and a cluster of its own."""
    if not (folder / f"{name}.json").exists():
        command = [sys.executable, __file__, "--contestant", name, "--folder", str(folder)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    found = json.loads((folder / f"{name}.json").read_text())
    return Recovery(found["killed"], found["furthest"], [Step(**step) for step in found["steps"]])


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    groups = (points[start : start + SMOOTH] for start in range(0, len(points), SMOOTH))
    return [(sum(x for x, _ in each) / len(each), sum(y for _, y in each) / len(each)) for each in groups]


def contest(name: str, folder: Path) -> None:
    """One contestant's run, in this process; leaves what came of it in the folder."""
    playground = Playground(NODES)
    ray.init(address=playground.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    store = Store.open(str(folder / "store"))
    data = complete(plan(load_recipe(RECIPE))["prepare"], store, Progress(), "bench")
    work = folder / name
    work.mkdir()
    run = {"plain": _train_plainly, "shoal": _train_with_shoal}[name]
    running = threading.Thread(target=run, args=(playground.cluster.address, data, work), daemon=True)
    running.start()
    furthest = {"plain": _furthest_of_plain, "shoal": _furthest_of_shoal}[name]
    epoch_steps = -(-Prepared(data.path).index.splits["train"].rows // BATCH)
    while furthest(work, epoch_steps) < KILL_AT:
        assert running.is_alive(), "it ended before a node was killed"
        time.sleep(0.2)
    killed = time.time()
    playground.host()
    time.sleep(_UNDER_WAY_SECONDS)
    reached = furthest(work, epoch_steps)
    running.join()
    if name == "shoal":  # While it trains, the file is up to five seconds old.
        reached = _furthest_of_shoal(work, epoch_steps)
    steps = {"plain": _steps_of_plain, "shoal": _steps_of_shoal}[name](work)
    result = {"killed": killed, "furthest": reached, "steps": [asdict(step) for step in steps]}
    (folder / f"{name}.json").write_text(json.dumps(result))


def _train_plainly(address: str, data: Artifact, work: Path) -> None:
    with encoder_folder(str(load_recipe(RECIPE).finetune.encoder)) as encoder:
        command = [sys.executable, plain_elastic.__file__, address, data.path.path, str(encoder), str(work)]
        subprocess.run(command, check=True, stdout=sys.stderr)


def _steps_of_plain(work: Path) -> list[Step]:
    log = work / "steps.jsonl"
    return [Step(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def _furthest_of_plain(work: Path, _: int) -> float:
    return max((step.epochs for step in _steps_of_plain(work)), default=0.0)


def _train_with_shoal(address: str, data: Artifact, work: Path) -> None:
    settings = FinetuneSettings(
        encoder=load_recipe(RECIPE).finetune.encoder,
        epochs=EPOCHS,
        lanes=LANES,
        microbatch=BATCH // LANES,
        learning_rate=RATE,
        workers={"min": 1, "max": NODES},
    )
    finetune.run(Task(settings, {"prepare": data}, UPath(work), Progress(), "bench"))


def _steps_of_shoal(work: Path) -> list[Step]:
    """As the curves have them; what a killed worker had not yet written is missing."""
    found = []
    for file in sorted(work.glob("tensorboard/*")):
        for event in EventFileLoader(str(file)).Load():
            found += [
                (event.wall_time, event.step, float(tensor_util.make_ndarray(value.tensor)))
                for value in event.summary.value
                if value.tag == "train/loss"
            ]
    epoch_steps = max(step for _, step, _ in found) / EPOCHS
    return [Step(time, step / epoch_steps, loss) for time, step, loss in sorted(found)]


def _furthest_of_shoal(work: Path, epoch_steps: int) -> float:
    files = [file for file in (work / "groups.json", work / "work" / "groups.json") if file.exists()]
    groups = json.loads(files[0].read_text()) if files else []
    return groups[0]["last_step"] / epoch_steps if groups else 0.0  # type: ignore[no-any-return]


def _print(found: dict[str, Recovery]) -> None:
    console = Console()
    console.print(describe_machine())
    console.print(f"{NODES} nodes; one is killed in epoch 2 of {EPOCHS}")
    table = Table("", "seconds to the next step", "epochs done again", "seconds until as far again", "last loss")
    for name, one in found.items():
        last = _smoothed([(step.time, step.loss) for step in one.steps[-SMOOTH:]])[0][1]
        figures = (f"{one.seconds:.1f}", f"{one.lost:.2f}", f"{one.until_as_far:.1f}", f"{last:.3f}")
        table.add_row(CONTESTANTS[name], *figures)
    console.print(table)
    ratio = found["shoal"].seconds / found["plain"].seconds
    console.print(f"Shoal takes its next step after {ratio:.2f} of the plain script's time.")


if __name__ == "__main__":
    main()
