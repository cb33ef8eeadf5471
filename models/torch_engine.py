"""The engine in torch: on a GPU where there is one, in half precision where the hardware has instructions for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.batches import CPU_PADDING, GPU_PADDING
from models.classifier import load
from models.encoders import set_padding
from models.engine import Encoded, Engine, FloatArray
from models.layers import compile_layers
from models.precision import DTYPES, autocast, usable
from models.settings import InputError, Precision
from models.spec import ClassifierSpec
from models.unpadded import Unpadded, accept_unpadded, agrees, has_kernel

_CPU_TURN = 1024
"""Tokens. MiniLM computes 413 tweets a second of CPU time in turns of 256 tokens, 491 of 1,024, 506 of 2,048 and 448 of
8,192; and the larger a turn, the longer its texts wait for each other."""


class TorchEngine(Engine):
    """A classifier in torch."""

    name = "torch"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        spec: ClassifierSpec,
        *,
        precision: Precision,
        pad_id: int,
        uses_type_ids: bool,
        temperature: Mapping[str, float],
        unpadded: Unpadded | None = None,
    ) -> None:
        super().__init__(spec, tokenizer, pad_id=pad_id, uses_type_ids=uses_type_ids, temperature=temperature)
        self.model = model
        self._unpadded = unpadded
        self._precision: Precision = precision
        self._device = next(model.parameters()).device
        self.precision = precision
        self.device = str(self._device)
        on_cpu = self._device.type == "cpu"
        self.max_padding = None if unpadded else CPU_PADDING if on_cpu else GPU_PADDING
        self.turn_tokens = _CPU_TURN if unpadded and on_cpu else None

    @torch.inference_mode()
    def forward(self, batch: Sequence[Encoded]) -> FloatArray:
        """One batch as it is: float32 [texts, total_classes].

        Its texts are laid end to end where the model takes that (`models.unpadded`), else padded to the longest.
        """
        with autocast(self._device, self._precision):
            if self._unpadded:
                types = [item.type_ids for item in batch if item.type_ids is not None]
                logits = self._unpadded([item.ids for item in batch], types or None)
            else:
                logits = self.model(**self.inputs(batch)).logits
        return np.asarray(logits.float().cpu().numpy(), dtype=np.float32)

    def inputs(self, batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """The model's keyword arguments for a batch, each [texts, longest], on the model's device."""
        lengths = [len(item.ids) for item in batch]
        longest = max(lengths)
        inputs = {"input_ids": self._padded([item.ids for item in batch], longest, self.pad_id)}
        inputs["attention_mask"] = self._padded([[1] * length for length in lengths], longest, 0)
        if batch[0].type_ids is not None:
            inputs["token_type_ids"] = self._padded([item.type_ids or [] for item in batch], longest, 0)
        return inputs

    def _padded(self, rows: Sequence[list[int]], length: int, fill: int) -> torch.Tensor:
        padded = [row + [fill] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long).to(self._device, non_blocking=True)


def load_torch_engine(
    folder: Path,
    *,
    precision: Precision = "bf16",
    threads: int | None = None,
    temperature: Mapping[str, float] | None = None,
    compile: bool = False,
) -> TorchEngine:
    """Loads the classifier in a local folder, onto a GPU where there is one.

    Args:
        folder: as `models.classifier.save` writes it.
        precision: where the hardware has no instructions for it, the next best is used; `engine.precision` tells.
        threads: CPU threads of this process, as torch sets by itself where None.
        temperature: by label column, what its logits are divided by; 1 where absent.
        compile: whether the encoder's layers are compiled, which the first batches wait for.

    Raises:
        InputError: the folder holds no classifier, a damaged one, or one without a fast tokenizer; or it is to be
            compiled, but cannot, or there is no compiler.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer, spec = load(folder)
    backend = fast_tokenizer(tokenizer, spec, folder)
    pad_id = set_padding(model, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = usable(precision, device)
    unpadded = accept_unpadded(model, spec.max_length) if has_kernel(model, device, precision) else None
    nn.Module.to(model, device).requires_grad_(False)
    if precision != "fp32":
        _store_weights_as(model, DTYPES[precision])
    if unpadded and device.type != "cpu" and not agrees(unpadded, spec.max_length, precision):
        unpadded.undo()
        unpadded = None
    if compile:
        check_compiler()
        compile_layers(model, "serve")
    return TorchEngine(
        model,
        backend,
        spec,
        precision=precision,
        pad_id=pad_id,
        uses_type_ids="token_type_ids" in tokenizer.model_input_names,
        temperature=temperature or {},
        unpadded=unpadded,
    )


def check_compiler() -> None:
    """Refuses to compile where torch finds no compiler for what it writes.

    Raises:
        InputError: there is none.
    """
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise InputError(
            "serve.compile is true, but the replica's node has no C++ compiler, which torch.compile needs: install g++ "
            "there, or set serve.compile to false."
        ) from error


def fast_tokenizer(tokenizer: PreTrainedTokenizerBase, spec: ClassifierSpec, folder: Path) -> Tokenizer:
    """The compiled tokenizer of the classifier in `folder`: pads nothing, cuts to the spec's length.

    Raises:
        InputError: it has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InputError(f"{folder} has no fast tokenizer: there must be a tokenizer.json in it.")
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_padding()
    backend.enable_truncation(spec.max_length)
    return backend


def _store_weights_as(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds the matrices once: autocast would do so again at every call, which costs more than a short text."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
