"""The engine in ONNX Runtime, for CPUs. Needs neither torch nor transformers.

Texts are computed one by one, whatever the batch: on a CPU that is as fast as any batch without padding, it wastes
nothing, and a text's answer does not depend on its neighbours (int8 activations are scaled by the largest one of all
that is computed together). So several CPUs do not share in a text either: each computes one, all with one set of
weights. Two that share in a short text compute 1.2 times as much as one does, two with a text each twice as much.

A folder holds

    model.onnx, model.onnx.data   the graph and its weights; input ids [1, tokens], type ids too for pairs, no mask
    onnx.json                     `OnnxNotes`
    classifier.json, tokenizer.json
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from models.engine import Encoded, Engine, FloatArray
from models.settings import InputError, Settings, first_line, read_settings
from models.spec import ClassifierSpec, read_spec

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
TOKENIZER = "tokenizer.json"
NOTES = "onnx.json"

OnnxPrecision = Literal["int8", "fp32"]


class OnnxNotes(Settings):
    """What the graph does not say of itself."""

    precision: OnnxPrecision
    pad_id: int
    uses_type_ids: bool
    sha256: dict[str, str]
    """By file name."""


class OnnxEngine(Engine):
    """A classifier in ONNX Runtime."""

    name = "onnx"
    device = "cpu"
    max_padding = None
    turn_tokens = 64
    """Some milliseconds, beside which going to the thread and back (0.1 ms) is nothing, and after which what was
    answered is sent."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        tokenizer: Tokenizer,
        spec: ClassifierSpec,
        notes: OnnxNotes,
        temperature: Mapping[str, float],
        lanes: int = 1,
    ) -> None:
        super().__init__(
            spec, tokenizer, pad_id=notes.pad_id, uses_type_ids=notes.uses_type_ids, temperature=temperature
        )
        self.precision = notes.precision
        self.lanes = lanes
        self._session = session

    def forward(self, batch: Sequence[Encoded]) -> FloatArray:
        """The texts' outputs, computed one by one: float32 [texts, total_classes]."""
        return np.concatenate([self._session.run(None, _inputs(item))[0] for item in batch])


def _inputs(item: Encoded) -> dict[str, Any]:
    inputs = {"input_ids": np.array([item.ids], dtype=np.int64)}
    if item.type_ids is not None:
        inputs["token_type_ids"] = np.array([item.type_ids], dtype=np.int64)
    return inputs


def load_onnx_engine(folder: Path, *, lanes: int = 1, temperature: Mapping[str, float] | None = None) -> OnnxEngine:
    """Loads the exported classifier in a local folder.

    Args:
        folder: as `models.onnx_export` writes it.
        lanes: texts that may be computed at once, each by one thread.
        temperature: by label column, what its logits are divided by; 1 where absent.

    Raises:
        InputError: the folder holds none, or one of its files is missing or not the one that was written.
    """
    notes = read_settings(OnnxNotes, folder / NOTES, "exported classifier")
    for name, expected in notes.sha256.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing; export the classifier anew.")
        if digest(folder / name) != expected:
            raise InputError(f"{folder / name} is damaged or changed: it is not the file that was exported.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # Both libraries raise bare ones.
        raise InputError(f"{folder} holds no classifier that can be loaded: {first_line(error)}") from error
    return OnnxEngine(session, tokenizer, read_spec(folder), notes, temperature or {}, lanes)


def digest(file: Path) -> str:
    """The SHA-256 of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
