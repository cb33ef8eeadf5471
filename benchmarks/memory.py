"""Peak memory of training, by what `finetune` is told to do with weights, activations and numbers.

    python benchmarks/memory.py    # about 4 minutes on 2 cores

A BERT of 12 layers with 54 million parameters takes steps over two lanes of 8 texts of 256 tokens, in fresh processes
of one thread. Prints each worker's peak of memory above what it had before the model, and the seconds of a step.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from cluster.memory import training_environment
from models.encoders import build_classifier
from models.feed import Feed
from models.labels import LabelColumn
from models.microbatch import Batch
from models.objectives import ClassificationObjective
from models.optimizer import build_optimizer, build_schedule
from models.precision import agreed
from models.training import LaneTrainer
from pipelines.finetune import FinetuneSettings
from pipelines.training.worker import lay_out

LABELS = (LabelColumn(name="label", classes=("a", "b")),)
SHAPE = {
    "vocab_size": 30522,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
}
LANES, TEXTS, TOKENS, STEPS = 2, 8, 256, 3
RECOMPUTED = {"activation_checkpointing": True}
SHARDED = {"fsdp": True, "exact": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32, float sums": (1, {"precision": "fp32", "exact": False}),
    "bf16, float sums": (1, {"exact": False}),
    "bf16, exact sums (the default)": (1, {}),
    "bf16, exact sums, compiled": (1, {"compile": True}),
    "bf16, exact sums, activation checkpointing": (1, RECOMPUTED),
    "bf16, exact sums, 2 workers": (2, {}),
    "bf16, float sums, 2 workers": (2, {"exact": False}),
    "bf16, FSDP, 2 workers": (2, SHARDED),
    "bf16, FSDP, activation checkpointing, 2 workers": (2, SHARDED | RECOMPUTED),
}


def microbatch(epoch: int, step: int, lane: int) -> Batch:
    """Random tokens."""
    draw = torch.Generator().manual_seed(100 * step + lane)
    ids = torch.randint(0, SHAPE["vocab_size"], (TEXTS, TOKENS), generator=draw)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, {"label": torch.randint(0, 2, (TEXTS,), generator=draw)}, list(range(TEXTS)), TEXTS)


def worker(rank: int, workers: int, port: int, given: dict[str, Any], results: Any) -> None:
    """Megabytes and seconds of a step, from the first worker."""
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    settings = FinetuneSettings(encoder="none", **given)
    before = _megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak is counted from here.
    model = build_classifier(LABELS, seed=0, fresh=partial(AutoConfig.for_model, "bert", **SHAPE))
    device = torch.device("cpu")
    precision = agreed(settings.precision, device)
    lay_out(model, settings, precision, workers, device)
    optimizer = build_optimizer(model, 1e-4, 0.01)
    trainer = LaneTrainer(
        model,
        ClassificationObjective(LABELS),
        Feed(10**6, 4096, LANES, TEXTS, 0),
        microbatch,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, "constant", STEPS, 0.0),
        precision=precision,
        exact=settings.exact,
        rank=rank,
        workers=workers,
    )
    if settings.compile:
        trainer.warm_up()  # Its peak is the compiler's, too.
    seconds = []
    for step in range(STEPS):
        started = time.monotonic()
        trainer.step(0, step)
        seconds.append(time.monotonic() - started)
    if rank == 0:
        results.put((_megabytes("VmHWM") - before, statistics.median(seconds)))
    if workers > 1:
        dist.destroy_process_group()


def _megabytes(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Measures each in processes of its own."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results: Any = multiprocessing.get_context("spawn").SimpleQueue()
    console, table = Console(), Table("", "peak of a worker, MB", "", "seconds of a step")
    first = 0.0
    for name, (workers, given) in LAYOUTS.items():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with mock.patch.dict(os.environ, training_environment()):
            mp.spawn(worker, (workers, port, given, results), nprocs=workers)
        megabytes, seconds = results.get()
        first = first or megabytes
        table.add_row(name, f"{megabytes:,.0f}", f"{megabytes / first:.2f}", f"{seconds:.2f}")
        console.print(f"{name}: {megabytes:,.0f} MB, {seconds:.2f} s", style="dim")
    console.print(describe_machine())
    console.print(table)


if __name__ == "__main__":
    main()
