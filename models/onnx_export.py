"""From a fine-tuned classifier to a graph for ONNX Runtime: fused kernels, and int8 weights where wanted.

transformers' own exporter does both. The graph has no attention mask, since texts are computed one by one and so
never padded. int8 is dynamic quantization, a scale for each output channel: weights are rounded once, activations are
scaled text by text as they come, so that no calibration set is needed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.exporters.configs import ExportFormat, OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.quantizers.quantizer_onnxruntime import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

from models.classifier import load
from models.encoders import set_padding
from models.onnx_engine import MODEL, NOTES, TOKENIZER, WEIGHTS, OnnxNotes, OnnxPrecision, digest
from models.settings import InputError, first_line
from models.spec import SPEC, ClassifierSpec
from models.torch_engine import fast_tokenizer


def export_onnx(folder: Path, outs: Mapping[OnnxPrecision, Path]) -> None:
    """Writes the classifier in `folder` as `models.onnx_engine` reads it, into a folder for each precision.

    Raises:
        InputError: the folder holds no classifier, or one that ONNX has no operators for.
    """
    write_onnx(*load(folder), folder, outs)


def write_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: ClassifierSpec,
    folder: Path,
    outs: Mapping[OnnxPrecision, Path],
) -> None:
    """Writes a classifier that was loaded from `folder`, and may have changed since, as `export_onnx` does.

    Raises:
        InputError: it has no fast tokenizer, or ONNX has no operators for it.
    """
    pad_id = set_padding(model, tokenizer)
    uses_type_ids = "token_type_ids" in tokenizer.model_input_names
    ids = torch.full((2, min(16, spec.max_length)), max(pad_id, 1) + 1, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids}
    if uses_type_ids and spec.pair:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    backend = fast_tokenizer(tokenizer, spec, folder)
    try:
        graph = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True, ort_fusions="cpu")).program
        for precision, out in outs.items():
            out.mkdir(parents=True, exist_ok=True)
            OnnxExporter.save_program(_quantized(graph, inputs) if precision == "int8" else graph, out / MODEL)
    except Exception as error:  # Of torch's tracer, the exporter, ONNX, ONNX Runtime: whatever each of them raises.
        raise InputError(f"the classifier cannot be written as ONNX: {first_line(error)}") from error
    for precision, out in outs.items():
        backend.save(str(out / TOKENIZER))
        (out / SPEC).write_text(spec.model_dump_json(indent=2), encoding="utf-8")
        notes = OnnxNotes(
            precision=precision,
            pad_id=pad_id,
            uses_type_ids=uses_type_ids,
            sha256={name: digest(out / name) for name in (MODEL, WEIGHTS, TOKENIZER, SPEC) if (out / name).exists()},
        )
        (out / NOTES).write_text(notes.model_dump_json(indent=2), encoding="utf-8")


def _quantized(graph: Any, inputs: dict[str, Any]) -> Any:
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True))
    return quantizer.quantize(graph, inputs, ExportFormat.ONNX)
