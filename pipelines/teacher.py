"""The teacher of a fine-tuning: a finished classifier, asked once for each row of the training set.

It reads the texts, with its own tokenizer, and what it says is kept as a table (`pipelines.training.soft_targets`)
beside the run's checkpoints. So training reads a teacher's logits as it reads labels: a step costs what it costs
without a teacher, and is the same on any number of workers. The table is computed in Ray tasks of whole files, each
file's rows by one task in float32, so that a row's logits depend neither on who computes them nor on how many do.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import ray
from upath import UPath

from cluster.store import local_copy, read_artifact
from models.distillation import teacher_order
from models.labels import LabelColumn, total_classes
from models.settings import InputError
from models.spec import SPEC, ClassifierSpec, read_spec
from models.torch_engine import TorchEngine, load_torch_engine
from pipelines.locate import identity, locate, telling_read_errors
from pipelines.parts import Result, run_parts
from pipelines.prepared import Prepared
from pipelines.stage import Task
from pipelines.training.soft_targets import SoftTargets

_SETTING = "finetune.teacher"
_FILES, _LEAST_ROWS, _MOST_ROWS = 64, 1_024, 32_768
"""A file is a task: enough of them for many workers, each worth loading the teacher for."""


def teacher_identity(reference: str) -> str:
    """What the teacher is, for fingerprints: its artifact's, or else a digest of its files.

    Raises:
        InputError: there is no classifier at `reference`.
    """
    folder = _folder(reference)
    with telling_read_errors(reference):
        artifact = read_artifact(folder.parent) if folder.name == "model" else None
    return artifact.record.fingerprint if artifact else identity([folder])


def soft_targets(reference: str, prepared: Prepared, task: Task) -> SoftTargets:
    """What the teacher says of each row of the training set, computed into the task's work as far as it is not there.

    Raises:
        InputError: there is no classifier at `reference`, its label columns and classes are not those of the data, or
            it gives no finite numbers.
        ClusterError: the store cannot be written.
    """
    folder, index = _folder(reference), prepared.index
    with local_copy(folder) as local:
        order = _order(read_spec(local), index.labels, reference, pair=index.pair)
    split = index.splits["train"]
    rows = min(max(split.rows // _FILES, _LEAST_ROWS), _MOST_ROWS)
    table = SoftTargets(
        folder=task.work / "teacher",
        classes=total_classes(index.labels),
        rows=split.rows,
        chunk_rows=split.chunk_rows,
        file_chunks=-(-rows // split.chunk_rows),
    )
    gpus = 1 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0
    ask = _AskTeacher(str(folder), str(prepared.folder), table, tuple(order))
    run_parts("ask the teacher", table.files, ask, task.work / "asked", task.progress, gpus)
    return table


def _folder(reference: str) -> UPath:
    try:
        folder = locate(reference)
        with telling_read_errors(reference):
            if (folder / SPEC).exists():
                return folder
    except InputError as error:
        raise InputError(f"{_SETTING}: {error}") from error
    raise InputError(
        f"{_SETTING}: {reference} is no classifier: there is no {SPEC} in it; name the folder `model` of a finetune "
        "artifact, or a registered version as NAME:NUMBER."
    )


def _order(spec: ClassifierSpec, labels: tuple[LabelColumn, ...], reference: str, *, pair: bool) -> list[int]:
    if spec.pair != pair:
        takes = "pairs of texts" if spec.pair else "single texts"
        raise InputError(f"{_SETTING}: {reference} takes {takes}, which the data does not have.")
    try:
        return teacher_order(labels, spec.labels)
    except InputError as error:
        raise InputError(f"{_SETTING}: {reference} cannot teach this: {error}") from error


@dataclass(frozen=True)
class _AskTeacher:
    """Computes one file of the table."""

    teacher: str
    prepared: str
    table: SoftTargets
    order: tuple[int, ...]

    def __call__(self, number: int, file: int) -> Result:
        prepared = Prepared(UPath(self.prepared))
        wanted = ["text", *(["text_pair"] if prepared.index.pair else [])]
        rows = pa.concat_tables([prepared.read_chunk("train", each, wanted) for each in self.table.chunks(file)])
        engine = _engine(self.teacher)
        pairs = rows["text_pair"].to_pylist() if prepared.index.pair else None
        logits = engine.logits(engine.encode(rows["text"].to_pylist(), pairs))
        if not np.isfinite(logits).all():
            raise InputError(f"{_SETTING}: {self.teacher} gives numbers that are not finite; take another.")
        self.table.write(file, logits[:, list(self.order)])
        return {"rows": len(logits)}


# Ray runs many tasks in one process: it loads the teacher once.
@lru_cache(maxsize=1)
def _engine(teacher: str) -> TorchEngine:
    with local_copy(UPath(teacher)) as folder:
        return load_torch_engine(folder, precision="fp32", threads=1)
