"""From a fine-tuned classifier to a graph for ONNX Runtime: fused kernels, and int8 weights where wanted.

transformers' own exporter does both. The graph has no attention mask, since texts are computed one by one and so
never padded. int8 is dynamic quantization, a scale for each output channel: weights are rounded once, activations are
scaled text by text as they come, so that no calibration set is needed.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.quantizers.quantizer_onnxruntime import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

from models.classifier import load
from models.encoders import set_padding
from models.onnx_engine import MODEL, NOTES, TOKENIZER, WEIGHTS, OnnxNotes, OnnxPrecision, digest
from models.settings import InputError, first_line
from models.spec import SPEC
from models.torch_engine import fast_tokenizer


def export_onnx(folder: Path, out: Path, precision: OnnxPrecision) -> None:
    """Writes the classifier in `folder` into `out` as `models.onnx_engine` reads it.

    Raises:
        InputError: the folder holds no classifier, or one that ONNX has no operators for.
    """
    model, tokenizer, spec = load(folder)
    pad_id = set_padding(model, tokenizer)
    uses_type_ids = "token_type_ids" in tokenizer.model_input_names
    ids = torch.full((2, min(16, spec.max_length)), max(pad_id, 1) + 1, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids}
    if uses_type_ids and spec.pair:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True)) if precision == "int8" else None
    config = OnnxConfig(dynamic=True, ort_fusions="cpu", quantizer=quantizer)
    try:
        exported = OnnxExporter().export(model, inputs, config=config)
    except Exception as error:  # Of torch's tracer, the exporter, ONNX, ONNX Runtime: whatever each of them raises.
        raise InputError(f"the classifier cannot be written as ONNX: {first_line(error)}") from error
    out.mkdir(parents=True, exist_ok=True)
    OnnxExporter.save_program(exported.program, out / MODEL)
    fast_tokenizer(tokenizer, spec, folder).save(str(out / TOKENIZER))
    (out / SPEC).write_text(spec.model_dump_json(indent=2), encoding="utf-8")
    files = [MODEL, WEIGHTS, TOKENIZER, SPEC]
    notes = OnnxNotes(
        precision=precision,
        pad_id=pad_id,
        uses_type_ids=uses_type_ids,
        sha256={name: digest(out / name) for name in files if (out / name).exists()},
    )
    (out / NOTES).write_text(notes.model_dump_json(indent=2), encoding="utf-8")
