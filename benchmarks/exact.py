"""What exactness costs: fixed-point sums against float sums, the ledger, checkpoints.

    python benchmarks/exact.py    # about 6 minutes on 2 cores

Two workers of one thread train MiniLM on the tweets to one airline, in alternating turns over the same steps: with
sums in fixed point, with float sums, and with torch's DistributedDataParallel, which sums while it goes back. Prints
texts/s of each, and the shares of the time that the ledger and checkpoints take.
"""

import argparse
import contextlib
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from upath import UPath

from cluster.connect import connected
from cluster.memory import training_environment
from cluster.store import Store
from models import dropout
from models.checkpoints import training_state
from models.encoders import build_classifier
from models.feed import Feed
from models.hostsum import WorkerSum
from models.ledger import digest
from models.microbatch import Batch
from models.objectives import ClassificationObjective
from models.optimizer import build_optimizer, build_schedule
from models.precision import agreed, autocast
from models.training import LaneTrainer
from pipelines.prepared import Prepared
from pipelines.pretrained import encoder_folder
from pipelines.progress import Progress
from pipelines.stage import complete
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.lanes import feed_over, text_batches
from pipelines.training.pace import Pace
from pipelines.training.settings import CheckpointSeconds
from recipes.loading import load_recipe
from recipes.planning import plan

RECIPE = Path(__file__).parent.parent / "recipes" / "airline.yaml"
TEXTS = "data.where.text=(?i)@americanair"
WORKERS, LANES, MICROBATCH = 2, 4, 8
WARM_UP = 5
FIXED, FLOAT, DDP = "fixed point (exact)", "float32, one sum after the last lane", "DistributedDataParallel"


Batches = Callable[[int, int, int], Batch | None]


@dataclass
class Found:
    """What the first worker measured."""

    texts_per_second: dict[str, list[float]] = field(default_factory=dict)
    ledger_share: float = 0.0
    checkpoint_seconds: float = 0.0
    checkpoint_interval: float = 0.0
    sent: float = 0.0
    """Megabytes that a worker gives to the fixed-point sums in a step."""
    parameters: int = 0


class Contestant:
    """A model with its optimizer that takes steps in one of the ways."""

    def __init__(self, name: str, data: Prepared, feed: Feed, reader: Batches, encoder: Path, rank: int) -> None:
        model = build_classifier(data.index.labels, seed=0, pretrained=encoder)
        dropout.use_stream(model)
        self.feed, self.reader, self.rank = feed, reader, rank
        self.objective = ClassificationObjective(data.index.labels)
        self.optimizer = build_optimizer(model, 1e-4, 0.01)
        self.precision = agreed("bf16", torch.device("cpu"))
        self.model = model
        self.step: Callable[[int], object]
        if name == DDP:
            self.parallel = DistributedDataParallel(model)
            self.step = self._ddp_step
            return
        schedule = build_schedule(self.optimizer, "constant", feed.steps, 0.0)
        given = {"optimizer": self.optimizer, "schedule": schedule, "precision": self.precision}
        place = {"rank": rank, "workers": WORKERS, "exact": name == FIXED}
        trainer = LaneTrainer(model, self.objective, feed, reader, **given, **place)
        self.step = lambda step: trainer.step(0, step)

    def _ddp_step(self, step: int) -> None:
        texts = sum(self.feed.lane_rows(0, step))
        lanes = range(self.rank, LANES, WORKERS)
        with autocast(torch.device("cpu"), self.precision):
            for lane in lanes:
                dropout.seed(self.feed.draw_seed(0, step, lane))
                batch = self.reader(0, step, lane)
                last = lane == lanes[-1]
                with contextlib.nullcontext() if last else self.parallel.no_sync():
                    # It means over the workers where a sum is wanted.
                    loss = self.objective(self.parallel(**batch.inputs).logits, batch.labels) * WORKERS / texts
                    loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextlib.contextmanager
def counting_bytes() -> Iterator[list[int]]:
    """What goes into the sums over the workers while the block runs."""
    counted: list[int] = []
    stretches = WorkerSum.stretches

    def counting(self: WorkerSum, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Any:
        counted.append(sum(len(tensor) for tensor in tensors) * dtype.itemsize)
        return stretches(self, tensors, dtype)

    with mock.patch.object(WorkerSum, "stretches", counting):
        yield counted


def worker(rank: int, port: int, folder: str, steps: int, turns: int, results: Any) -> None:
    """One of the two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS)
    data = Prepared(UPath(folder))
    feed = feed_over(data.index.splits["train"], LANES, MICROBATCH, 0)
    reader = text_batches(data, feed, range(rank, LANES, WORKERS))
    # All lanes have texts there, which DistributedDataParallel needs.
    full = [step for step in range(feed.steps) if all(feed.lane_rows(0, step))][: WARM_UP + steps]
    found = Found()
    with encoder_folder(str(load_recipe(RECIPE).finetune.encoder)) as encoder:
        contestants = {name: Contestant(name, data, feed, reader, encoder, rank) for name in (FIXED, FLOAT, DDP)}
    for contestant in contestants.values():
        with counting_bytes() as counted:
            for step in full[:WARM_UP]:
                contestant.step(step)
        found.sent = found.sent or sum(counted) / WARM_UP / 1e6
    names = list(contestants)
    for turn in range(turns):
        for name in names if turn % 2 == 0 else reversed(names):
            dist.barrier()
            started = time.monotonic()
            for step in full[WARM_UP:]:
                contestants[name].step(step)
            seconds = time.monotonic() - started
            texts = sum(sum(feed.lane_rows(0, step)) for step in full[WARM_UP:])
            found.texts_per_second.setdefault(name, []).append(texts / seconds)
            if name == FIXED:
                found.ledger_share = _ledger_seconds(feed, reader, full[WARM_UP:], rank) / seconds
    exact = contestants[FIXED]
    found.parameters = sum(p.numel() for p in exact.model.parameters())
    pace = Pace(CheckpointSeconds().min, CheckpointSeconds().max)
    with tempfile.TemporaryDirectory() as kept:
        paths: list[Any] = [kept]
        dist.broadcast_object_list(paths)
        checkpoints = Checkpoints(UPath(paths[0]), print, rank, WORKERS)
        for number, step in enumerate(full[:WARM_UP]):
            exact.step(step)
            if number in (0, 2):  # The second one is like all that follow.
                checkpoints.save(number, training_state(exact.model, exact.optimizer), {}, {"losses": torch.zeros(9)})
        checkpoints.wait()
        dist.barrier()
    pace.cost = checkpoints.seconds
    found.checkpoint_seconds, found.checkpoint_interval = checkpoints.seconds or 0.0, pace.interval
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def _ledger_seconds(feed: Feed, reader: Batches, steps: list[int], rank: int) -> float:
    """What a worker spends on the digests of its lanes."""
    batches = [reader(0, step, lane) for step in steps for lane in range(rank, LANES, WORKERS)]
    started = time.monotonic()
    for batch in batches:
        digest(batch.rows if batch else [])
    return time.monotonic() - started


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="of a turn")
    parser.add_argument("--turns", type=int, default=6)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    results: Any = spawn.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        with connected(cpus=WORKERS):
            data = complete(plan(load_recipe(RECIPE, [TEXTS]))["prepare"], Store.open(folder), Progress(), "bench")
        with mock.patch.dict(os.environ, training_environment()):
            mp.spawn(worker, (port, data.path.path, options.steps, options.turns, results), nprocs=WORKERS)
        found: Found = results.get()
    print_found(found, options)


def print_found(found: Found, options: argparse.Namespace) -> None:
    console = Console()
    console.print(describe_machine())
    console.print(
        f"MiniLM, {WORKERS} workers of one thread, {options.turns} turns of {options.steps} steps each: medians"
    )
    speed = {name: statistics.median(each) for name, each in found.texts_per_second.items()}
    table = Table("gradients summed in", "texts/s", "against DDP", "MB given by a worker in a step")
    for name, each in speed.items():
        sent = found.sent if name == FIXED else found.parameters * 4 / 1e6
        table.add_row(name, f"{each:.1f}", f"{each / speed[DDP]:.2f}", f"{sent:.0f}")
    console.print(table)
    console.print(
        "Of the embeddings only the rows of tokens that occur are summed in fixed point. Both workers being on one "
        "host, its sums go through memory that they share; those of the others through torch's gloo."
    )
    console.print(f"The ledger's digests take {found.ledger_share:.4%} of the time.")
    share = found.checkpoint_seconds / found.checkpoint_interval
    console.print(
        f"A checkpoint takes {found.checkpoint_seconds:.2f} s and comes every {found.checkpoint_interval:.0f} s "
        f"while nothing fails: {share:.2%} of the time."
    )


if __name__ == "__main__":
    main()
