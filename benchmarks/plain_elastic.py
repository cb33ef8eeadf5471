"""Elastic training as the documentation of Ray Train shows it: the contestant of `elastic.py`.

    python benchmarks/plain_elastic.py ADDRESS PREPARED ENCODER FOLDER

Resumes at epochs, and divides the batch by the number of workers that there are; Ray's own settings. Writes a line
of JSON for each optimizer step into FOLDER/steps.jsonl.
"""

import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.train.torch
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

EPOCHS, BATCH, RATE, NODES = 2, 32, 1e-4, 3


def collated(rows: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
    """A padded batch."""
    ids = [torch.tensor(row) for row, _ in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor([label for _, label in rows]),
    }


def loop(config: dict[str, Any]) -> None:
    """What each worker runs."""
    torch.set_num_threads(1)
    table = pq.read_table(config["prepared"] + "/train")
    (label,) = (name for name in table.column_names if name.startswith("label:"))
    rows = list(zip(table["input_ids"].to_pylist(), table[label].to_pylist(), strict=True))
    classes = 1 + max(target for _, target in rows)
    model = AutoModelForSequenceClassification.from_pretrained(config["encoder"], num_labels=classes)
    model = ray.train.torch.prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    first = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as saved:
            state = torch.load(Path(saved) / "state.pt")
        getattr(model, "module", model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1
    context = ray.train.get_context()
    workers, rank = context.get_world_size(), context.get_world_rank()
    loader = DataLoader(rows, batch_size=BATCH // workers, shuffle=True, collate_fn=collated)
    loader = ray.train.torch.prepare_data_loader(loader)
    for epoch in range(first, EPOCHS):
        if workers > 1:
            loader.sampler.set_epoch(epoch)
        for step, batch in enumerate(loader):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if rank == 0:
                line = {"time": time.time(), "epochs": epoch + (step + 1) / len(loader), "loss": loss.item()}
                with Path(config["log"]).open("a") as log:
                    log.write(json.dumps(line) + "\n")
        with tempfile.TemporaryDirectory() as folder:
            kept = None
            if rank == 0:
                weights = getattr(model, "module", model).state_dict()
                state = {"model": weights, "optimizer": optimizer.state_dict(), "epoch": epoch}
                torch.save(state, Path(folder) / "state.pt")
                kept = Checkpoint.from_directory(folder)
            ray.train.report({"epoch": epoch}, checkpoint=kept)


def main() -> None:
    """Trains to the end."""
    address, prepared, encoder, folder = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    TorchTrainer(
        loop,
        train_loop_config={"prepared": prepared, "encoder": encoder, "log": f"{folder}/steps.jsonl"},
        scaling_config=ScalingConfig(num_workers=(1, NODES), resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="plain", storage_path=folder, failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
