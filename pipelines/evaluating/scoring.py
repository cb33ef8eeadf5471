"""Scoring: the logits of a classifier for whole splits of a prepared dataset.

A small set is scored in this process: starting others would take longer. A large one is scored by Ray tasks of
some thousand rows each, wherever the cluster has room; a lost node's tasks run again elsewhere. Only the logits are
kept: 4 bytes a row and class.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from upath import UPath

from cluster.store import local_copy
from models.engine import Encoded
from models.labels import LabelColumn, total_classes
from models.settings import InputError, Precision
from models.torch_engine import TorchEngine, load_torch_engine
from pipelines.prepared import Prepared
from pipelines.progress import Progress, Step
from pipelines.training.lanes import read_labels

IN_PROCESS_ROWS = 10_000
_TASK_ROWS = 2_000
# A GPU's process ends with its task, so a task must be worth loading the classifier for.
_GPU_TASK_ROWS = 50_000


@dataclass(frozen=True)
class Scored:
    """A split as the classifier sees it."""

    rows: npt.NDArray[np.int64]
    """The rows' identities [n]."""
    logits: npt.NDArray[np.float32]
    """[n, classes of all label columns]."""
    labels: dict[str, npt.NDArray[Any]]
    """By label column: int64 [n], -1 where missing, or bool [n, classes]."""


@dataclass(frozen=True)
class Scoring:
    """Scored splits, and how fast that went."""

    splits: dict[str, Scored]
    texts_per_second: float
    """Loading not counted in this process; everything counted on a cluster."""
    precision: str
    """What the numbers were computed in; both, where the hosts of a cluster differ."""


def score(prepared: Prepared, splits: Sequence[str], model: UPath, precision: Precision, progress: Progress) -> Scoring:
    """Scores `splits` with the classifier in the folder `model`, in stored order.

    Raises:
        InputError: the classifier gives no finite numbers.
    """
    columns = prepared.index.labels
    total = sum(prepared.index.splits[split].rows for split in splits)
    logits = {
        split: np.empty((prepared.index.splits[split].rows, total_classes(columns)), np.float32) for split in splits
    }
    with progress.step("score", total) as step:
        if total <= IN_PROCESS_ROWS or not ray.is_initialized():
            with local_copy(model) as folder:
                engine = load_torch_engine(folder, precision=precision)
            used: str = engine.precision
            done, started = 0, time.monotonic()
            for split in splits:
                encoded = encode_rows(prepared.read_split(split, encoded_columns(prepared)))
                logits[split][:] = engine.logits(encoded, progress=partial(_advance, step, done))
                done += len(encoded)
        else:
            started = time.monotonic()
            used = " and ".join(sorted(_score_on_cluster(prepared, logits, model, precision, step.update)))
    seconds = time.monotonic() - started
    if not all(np.isfinite(found).all() for found in logits.values()):
        raise InputError(f"the classifier {model} gives numbers that are not finite: its training has failed.")
    scored = {split: _with_labels(prepared, split, logits[split]) for split in splits}
    return Scoring(scored, total / max(seconds, 1e-9), used)


def _advance(step: Step, before: int, done: int) -> None:
    step.update(before + done)


def _score_on_cluster(
    prepared: Prepared, logits: dict[str, npt.NDArray[np.float32]], model: UPath, precision: Precision, update: Any
) -> set[str]:
    """Fills the splits' logits; gives the precisions that they were computed in."""
    resources: dict[str, float] = ray.cluster_resources()
    gpus = 1 if resources.get("GPU", 0) >= 1 else 0
    # A node may vanish any number of times; an error of our own is raised at once all the same.
    task = _score_chunks.options(num_gpus=gpus, max_retries=-1)
    waiting: dict[Any, tuple[str, int]] = {}
    for split in logits:
        index = prepared.index.splits[split]
        chunks = index.chunks
        step = max(1, (_GPU_TASK_ROWS if gpus else _TASK_ROWS) // index.chunk_rows)
        for first in range(0, chunks, step):
            wanted = range(first, min(first + step, chunks))
            reference = task.remote(str(prepared.folder), split, wanted, str(model), precision)
            waiting[reference] = (split, first * index.chunk_rows)
    done, used = 0, set[str]()
    while waiting:
        (finished,), _ = ray.wait(list(waiting), num_returns=1)
        split, start = waiting.pop(finished)
        found, in_precision = ray.get(finished)
        used.add(in_precision)
        logits[split][start : start + len(found)] = found
        done += len(found)
        update(done)
    return used


@ray.remote(num_cpus=1)
def _score_chunks(
    folder: str, split: str, chunks: range, model: str, precision: Precision
) -> tuple[npt.NDArray[np.float32], str]:
    prepared = _prepared(folder)
    tables = [prepared.read_chunk(split, chunk, encoded_columns(prepared)) for chunk in chunks]
    engine = _engine(model, precision)
    return engine.logits(encode_rows(pa.concat_tables(tables))), engine.precision


# Ray runs many tasks in one process: each loads what it needs once.
@lru_cache(maxsize=1)
def _engine(model: str, precision: Precision) -> TorchEngine:
    with local_copy(UPath(model)) as folder:
        return load_torch_engine(folder, precision=precision, threads=1)


@lru_cache(maxsize=1)
def _prepared(folder: str) -> Prepared:
    return Prepared(UPath(folder))


def encode_rows(rows: pa.Table) -> list[Encoded]:
    """Prepared rows as the engine takes them; they are tokenised already."""
    ids = rows["input_ids"].to_pylist()
    types = rows["token_type_ids"].to_pylist() if "token_type_ids" in rows.column_names else [None] * len(ids)
    cut = rows["truncated"].to_pylist()
    return [Encoded(*row) for row in zip(ids, types, cut, strict=True)]


def label_arrays(rows: pa.Table, columns: Sequence[LabelColumn]) -> dict[str, npt.NDArray[Any]]:
    """The labels of prepared rows, by column: int64 [n], or ones and zeros [n, classes]; -1 where missing."""
    return {column.name: read_labels(rows[f"label:{column.name}"], column) for column in columns}


def encoded_columns(prepared: Prepared) -> list[str]:
    """What `encode_rows` needs of prepared rows."""
    return ["input_ids", *(["token_type_ids"] if prepared.index.pair else []), "truncated"]


def _with_labels(prepared: Prepared, split: str, logits: npt.NDArray[np.float32]) -> Scored:
    columns = prepared.index.labels
    rows = prepared.read_split(split, ["row", *(f"label:{column.name}" for column in columns)])
    return Scored(rows["row"].to_numpy(), logits, label_arrays(rows, columns))
