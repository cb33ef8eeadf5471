"""Training speed and accuracy: the textbook loop, transformers' Trainer, and Shoal; same data, model and epochs.

    python benchmarks/finetune.py                                  # all tweets: over an hour on 2 cores
    python benchmarks/finetune.py --airlines "united|americanair"  # those to two airlines: about 30 minutes

Prints texts/s of each (training alone: no loading, no validation) and the accuracy on the same test split, as ratios
too; then, in turns, the bare loop and Shoal over the very same batches, which shows what Ray, checkpoints and curves
cost. Several seeds or turns: medians.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from upath import UPath

from cluster.connect import connected
from cluster.memory import training_environment
from cluster.store import Store
from models import dropout
from models.encoders import build_classifier
from models.objectives import ClassificationObjective
from models.optimizer import build_optimizer, build_schedule
from models.precision import agreed
from models.training import LaneTrainer
from pipelines.prepared import Prepared
from pipelines.pretrained import encoder_folder
from pipelines.progress import Progress
from pipelines.stage import complete
from pipelines.training.lanes import feed_over, text_batches
from recipes.loading import load_recipe
from recipes.planning import plan

RECIPE = Path(__file__).parent.parent / "recipes" / "airline.yaml"
THREADS = 2
BEST = "(c) Trainer at its best: bf16, by length"
BARE = "(e) bare loop on Shoal's batches, 1 thread"
SHOAL = "(e) Shoal, 1 worker of 1 thread"


@dataclass(frozen=True)
class Row:
    """One contestant's figures for one seed."""

    name: str
    texts_per_second: float
    accuracy: float


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """A split as transformers' Trainer takes it."""

    def __init__(self, prepared: Prepared, split: str) -> None:
        table = prepared.read_split(split)
        label = prepared.index.labels[0].name
        self.items = [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": target}
            for ids, target in zip(table["input_ids"].to_pylist(), table[f"label:{label}"].to_pylist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def fresh_model(encoder: str, classes: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=classes).train()


@torch.inference_mode()
def accuracy(model: Any, rows: Rows) -> float:
    model.eval()
    hits = 0
    for item in rows.items:
        hits += int(model(input_ids=torch.tensor([item["input_ids"]])).logits.argmax() == item["labels"])
    return hits / len(rows)


def textbook(model: Any, rows: Rows, epochs: int, seed: int) -> float:
    """Everything padded to 128, float32, batches of 16, learning rate 2e-5."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    random = np.random.default_rng(seed)
    ids = torch.zeros(len(rows), 128, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.tensor([item["labels"] for item in rows.items])
    for position, item in enumerate(rows.items):
        ids[position, : len(item["input_ids"])] = torch.tensor(item["input_ids"])
        mask[position, : len(item["input_ids"])] = 1
    started = time.monotonic()
    for _ in range(epochs):
        order = torch.from_numpy(random.permutation(len(rows)))
        for batch in order.split(16):
            optimizer.zero_grad()
            logits = model(input_ids=ids[batch], attention_mask=mask[batch]).logits
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
    return epochs * len(rows) / (time.monotonic() - started)


class Clock(TrainerCallback):
    """When Trainer's steps began and ended, without what it sets up before."""

    began = ended = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.monotonic()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.ended = time.monotonic()


def trainer(model: Any, tokenizer: Any, rows: Rows, epochs: int, seed: int, **best: Any) -> float:
    """transformers.Trainer with its defaults, or with what is given."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            use_cpu=True,
            seed=seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **best,
        )
        clock = Clock()
        collator = DataCollatorWithPadding(tokenizer)
        Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[clock]).train()
        return epochs * len(rows) / (clock.ended - clock.began)


def best(settings: Any) -> dict[str, Any]:
    """What makes Trainer fast, with the very step that Shoal takes: as many texts, the same peak rate and warm-up."""
    return {
        "bf16": True,
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": settings.microbatch,
        "gradient_accumulation_steps": settings.lanes,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "warmup_steps": settings.warmup,
    }


def shoal(overrides: list[str], store: Store) -> tuple[float, Any]:
    """`shoal finetune` with its checkpoints and curves; texts/s as it records them."""
    recipe = load_recipe(RECIPE, [*overrides, f"store={store.root.path}"])
    with connected(cpus=THREADS):
        artifact = complete(plan(recipe)["finetune"], store, Progress(Console(quiet=True)), recipe.name)
    folder = Path((artifact.path / "model").path)
    return artifact.record.metrics["texts_per_second"], AutoModelForSequenceClassification.from_pretrained(folder)


def bare_loop(data: UPath, epochs: int, settings: Any) -> float:
    """The very batches of a Shoal run with one worker, without Ray, checkpoints, curves and validation."""
    prepared = Prepared(data)
    torch.set_num_threads(settings.threads)
    seed = settings.seed
    split = prepared.index.splits["train"]
    feed = feed_over(split, settings.lanes, settings.microbatch, seed)
    with encoder_folder(settings.encoder) as encoder:
        model = build_classifier(prepared.index.labels, seed=seed, pretrained=encoder)
    optimizer = build_optimizer(model, settings.learning_rate, settings.weight_decay)
    reader = text_batches(prepared, feed, range(feed.lanes))
    dropout.use_stream(model)
    loop = LaneTrainer(
        model,
        ClassificationObjective(prepared.index.labels),
        feed,
        reader,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, settings.schedule, epochs * feed.steps, settings.warmup),
        precision=agreed(settings.precision, torch.device("cpu")),
        clip=settings.clip,
        exact=settings.exact,
    )
    started = time.monotonic()
    for epoch in range(epochs):
        for step in range(feed.steps):
            loop.step(epoch, step)
    return epochs * split.rows / (time.monotonic() - started)


def trainer_at_its_best(
    encoder: str, tokenizer: Any, train: Rows, test: Rows, classes: int, epochs: int, seed: int, settings: Any
) -> tuple[float, float]:
    """(c): texts/s and accuracy."""
    torch.set_num_threads(THREADS)
    model = fresh_model(encoder, classes, seed)
    speed = trainer(model, tokenizer, train, epochs, seed, **best(settings))
    return speed, accuracy(model, test)


def alone(environment: Mapping[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process of its own, as a Ray worker is: no kernels are cached yet."""
    with mock.patch.dict(os.environ, environment), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--airlines", default="all", help="handles joined by |, or all")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2, help="of (e), in alternating order")
    parser.add_argument("--only", default="abcde", help="which contestants, by letter")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    where = [] if options.airlines == "all" else [f"data.where.text=(?i)@({options.airlines})"]
    results: list[Row] = []

    def add(row: Row) -> None:
        results.append(row)
        print(f"{row.name}: {row.texts_per_second:.1f} texts/s", flush=True)

    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        store = Store.open(folder)
        recipe = load_recipe(RECIPE, [*where, f"store={folder}"])
        with connected(cpus=THREADS):
            data = complete(plan(recipe)["prepare"], store, Progress(), recipe.name).path
        prepared = Prepared(data)
        train, test = Rows(prepared, "train"), Rows(prepared, "test")
        classes = len(prepared.index.labels[0].classes)
        with encoder_folder(str(recipe.finetune.encoder)) as encoder:
            tokenizer = AutoTokenizer.from_pretrained(encoder)
            for seed in range(options.seeds):
                ours = [*where, f"finetune.epochs={options.epochs}", f"finetune.seed={seed}"]
                if "a" in options.only:
                    model = fresh_model(encoder, classes, seed)
                    speed = textbook(model, train, options.epochs, seed)
                    add(Row("(a) textbook loop: padded to 128, fp32", speed, accuracy(model, test)))
                if "b" in options.only:
                    model = fresh_model(encoder, classes, seed)
                    speed = trainer(model, tokenizer, train, options.epochs, seed)
                    add(Row("(b) Trainer, defaults", speed, accuracy(model, test)))
                if "c" in options.only:
                    job = (encoder, tokenizer, train, test, classes, options.epochs, seed, recipe.finetune)
                    add(Row(BEST, *alone({}, trainer_at_its_best, *job)))
                    add(Row(f"{BEST}, jemalloc", *alone(training_environment(), trainer_at_its_best, *job)))
                if "d" in options.only:
                    speed, model = shoal([*ours, "finetune.workers=1", f"finetune.threads={THREADS}"], store)
                    add(Row("(d) Shoal, 1 worker of 2 threads", speed, accuracy(model, test)))
                    speed, model = shoal([*ours, "finetune.workers=2"], store)
                    add(Row("(d) Shoal, 2 workers of 1 thread", speed, accuracy(model, test)))
        if "e" in options.only:
            ours = [*where, f"finetune.epochs={options.epochs}", "finetune.workers=1"]
            settings = load_recipe(RECIPE, ours).finetune
            for turn in range(options.turns):
                for name in (BARE, SHOAL) if turn % 2 == 0 else (SHOAL, BARE):
                    if name == BARE:
                        speed = alone(training_environment(), bare_loop, data, options.epochs, settings)
                    else:
                        # A store of its own for each turn: what is there already is not made again.
                        with tempfile.TemporaryDirectory(prefix="shoal-bench-") as other:
                            speed, _ = shoal(ours, Store.open(other))
                    add(Row(name, speed, float("nan")))
    print_table(results, len(train), options)


def print_table(results: list[Row], texts: int, options: argparse.Namespace) -> None:
    console = Console()
    console.print(describe_machine())
    console.print(f"{texts:,} training texts, {options.epochs} epochs, {options.seeds} seed(s): medians")
    table = Table("", "texts/s", "against (a)", "against (c)", "test accuracy")
    names = list(dict.fromkeys(row.name for row in results))
    speed = {name: statistics.median(r.texts_per_second for r in results if r.name == name) for name in names}
    for name in names:
        hit = statistics.median(row.accuracy for row in results if row.name == name)
        ratios = []
        for letter in ("(a)", "(c)"):
            against = next((speed[other] for other in names if other.startswith(letter)), None)
            ratios.append(f"{speed[name] / against:.2f}" if against else "")
        table.add_row(name, f"{speed[name]:.1f}", *ratios, "" if np.isnan(hit) else f"{hit:.3f}")
    console.print(table)
    if {BARE, SHOAL} <= set(names):
        console.print(
            f"Ray, checkpoints and curves take {1 - speed[SHOAL] / speed[BARE]:.1%} of the bare loop's speed."
        )


if __name__ == "__main__":
    main()
