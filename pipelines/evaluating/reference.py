"""The reference: what texts and answers look like on the validation split, so that an endpoint can tell drift."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer
from upath import UPath

from models.drift import Reference, make_reference
from models.engine import unknown_id
from models.labels import LabelColumn, spans
from pipelines.evaluating.calibration import Floats, probabilities
from pipelines.metrics import decide
from pipelines.prepared import Prepared

_TOKENIZER = "tokenizer.json"


def measure_reference(
    prepared: Prepared, split: str, logits: Floats, temperature: Mapping[str, float], model: UPath
) -> Reference:
    """The reference by a split that has been scored already.

    Args:
        prepared: the dataset.
        split: which split.
        logits: the classifier's outputs for it, [n, classes of all columns].
        temperature: by label column, what the logits are divided by.
        model: the classifier's folder, for its tokenizer's unknown token.
    """
    columns = prepared.index.labels
    ids = prepared.read_split(split, ["input_ids"])["input_ids"]
    unknown = unknown_id(Tokenizer.from_str((model / _TOKENIZER).read_text(encoding="utf-8")))
    return make_reference(
        columns,
        {column.name: decide(logits[:, span], column.multi) for column, span in spans(columns)},
        _confidence(columns, logits, temperature),
        pc.list_value_length(ids).to_numpy(),
        0 if unknown is None else _count(ids, unknown),
        split,
    )


def _confidence(columns: Sequence[LabelColumn], logits: Floats, temperature: Mapping[str, float]) -> dict[str, Floats]:
    """By column, the likeliest class's probability [n]."""
    return {
        column.name: probabilities(logits[:, span], column.multi, temperature[column.name]).max(axis=1)
        for column, span in spans(columns)
    }


def _count(ids: pa.ChunkedArray, token: int) -> int:
    return sum(int(np.count_nonzero(chunk.flatten().to_numpy() == token)) for chunk in ids.chunks)
