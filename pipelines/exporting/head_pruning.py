"""Exporting a classifier without the heads that matter least, which training texts tell."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from models.classifier import load
from models.encoders import set_padding
from models.heads import head_importance, least_important, remove_heads
from models.objectives import ClassificationObjective
from models.onnx_engine import OnnxPrecision
from models.onnx_export import write_onnx
from models.settings import InputError
from pipelines.prepared import Prepared
from pipelines.training.lanes import read_chunk

_TEXTS, _BATCH_TEXTS = 512, 32


def export_without_heads(folder: Path, outs: Mapping[OnnxPrecision, Path], prepared: Prepared, share: float) -> None:
    """As `models.onnx_export.export_onnx`, without a share of the heads.

    They are judged on the first texts of the training set, so that the validation split, on which the export is
    compared, stays one that nothing was chosen on.

    Raises:
        InputError: the heads of such a classifier cannot be removed, no text has a label to judge them by, or the
            rest cannot be written as ONNX.
    """
    model, tokenizer, spec = load(folder)
    pad = set_padding(model, tokenizer)
    importance = head_importance(model, _batches(prepared, pad), ClassificationObjective(spec.labels))
    if not importance.any():
        raise InputError(f"of the first {_TEXTS} training texts none has a label, by which heads could be judged.")
    remove_heads(model, least_important(importance, share))
    write_onnx(model, tokenizer, spec, folder, outs)


def _batches(prepared: Prepared, pad: int) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
    """Inputs and labels of the first training texts, which stand in a shuffled order; texts of like lengths."""
    split = prepared.index.splits["train"]
    chunk = read_chunk(prepared, "train", 0, -(-_TEXTS // split.chunk_rows))
    order = np.argsort(chunk.lengths[:_TEXTS], kind="stable")
    for start in range(0, len(order), _BATCH_TEXTS):
        batch = chunk.batch(order[start : start + _BATCH_TEXTS], pad)
        yield batch.inputs, batch.labels
