"""Validation during training: the same bits on every worker and for every number of workers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from models.labels import LabelColumn, total_classes
from models.precision import autocast
from models.training import LaneTrainer
from pipelines.metrics import classification_metrics
from pipelines.prepared import Prepared
from pipelines.training.lanes import Chunk, read_chunk

_BATCH_TEXTS = 32


def validation_metrics(
    prepared: Prepared, trainer: LaneTrainer, labels: tuple[LabelColumn, ...], pad: int, stopped: Callable[[], bool]
) -> dict[str, float] | None:
    """The metrics on the validation split, or None where it was `stopped` on the way; every worker must call it.

    Chunks are dealt to the workers; each fills its rows of one array of logits, and the arrays are added up, which
    is exact because all but one hold zeros.
    """
    split = prepared.index.splits["validation"]
    logits = torch.zeros(split.rows, total_classes(labels), device=trainer.device)
    trainer.model.eval()
    targets: dict[str, list[np.ndarray[Any, Any]]] = {column.name: [] for column in labels}
    batches = -(-split.chunk_rows // _BATCH_TEXTS)
    for number in range(-(-split.chunks // trainer.workers) * trainer.workers):
        chunk = read_chunk(prepared, "validation", number) if number < split.chunks else None
        if chunk:
            for column in labels:
                targets[column.name].append(chunk.labels[column.name])
        if number % trainer.workers == 0 and trainer.hear(stopped()):
            return None
        if number % trainer.workers == trainer.rank:
            done = 0
            if chunk:
                start = number * split.chunk_rows
                done = _score(chunk, trainer, logits[start : start + len(chunk.rows)], pad)
            for _ in range(done, batches):
                trainer.idle()
    if trainer.workers > 1:
        dist.all_reduce(logits)
    joined = {name: np.concatenate(parts) for name, parts in targets.items()}
    return classification_metrics(logits.cpu().numpy(), joined, labels)


def _score(chunk: Chunk, trainer: LaneTrainer, out: torch.Tensor, pad: int) -> int:
    """Fills in the logits of a chunk's rows, [rows, classes], in stored order; gives the number of batches.

    They are computed in batches of like lengths.
    """
    order = np.argsort(chunk.lengths, kind="stable")
    for start in range(0, len(order), _BATCH_TEXTS):
        items = order[start : start + _BATCH_TEXTS]
        batch = chunk.batch(items, pad)
        inputs = {name: value.to(trainer.device) for name, value in batch.inputs.items()}
        with torch.no_grad(), autocast(trainer.device, trainer.precision):
            out[torch.from_numpy(items).to(trainer.device)] = trainer.model(**inputs).logits.float()
    return -(-len(order) // _BATCH_TEXTS)
