"""An engine: a loaded classifier, texts in and probabilities out.

`encode` -> `logits` -> `probabilities` are the three steps, apart so that a server can tokenise in one thread
and compute in another; `classify` is all of them. Texts are computed in groups of nearly equal length
(`models.batches`) and answered in the order given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from models.batches import CPU_PADDING, GPU_PADDING, group_by_length
from models.classifier import ClassifierSpec, load
from models.encoders import set_padding
from models.labels import LabelColumn, spans, total_classes
from models.precision import DTYPES, Precision, autocast, usable
from models.settings import InputError
from models.text import cleaned

_OPENING = 32
"""Characters for each token of max_length that are read of a long text at first."""

_SPARE = 64
"""Tokens beyond max_length that the read part of a long text must have: where a tokenizer's words do not end at spaces,
the last few tokens before the cut may be others than in the whole text."""

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text (or pair) as the model reads it."""

    ids: list[int]
    """Token ids with special tokens, at most `max_length`."""
    type_ids: list[int] | None
    """Which text of a pair each token is of; None for single texts and models that do not ask."""
    truncated: bool
    """Whether text was lost to `max_length`."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is said of one label column."""

    label: str | list[str] | None
    """The likeliest class; for a multi-label column every class of probability 1/2 or more. None where the
    model gave no finite numbers."""
    probabilities: dict[str, float]
    """By class, in the column's order; empty where the model gave no finite numbers."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said of one text."""

    labels: dict[str, Prediction]
    """By label column."""
    truncated: bool
    tokens: int


class TorchEngine:
    """A classifier in torch, on a GPU where there is one. Not for use by several threads at once, but for `encode`."""

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
    ) -> None:
        self.spec = spec
        self.precision: Precision = precision
        """What is used in fact: half precision falls back where the hardware has no instructions for it."""
        self.device = next(model.parameters()).device
        self.max_padding = CPU_PADDING if self.device.type == "cpu" else GPU_PADDING
        """The share of a batch that may be padding before it is slower than two batches."""
        self._model = model
        self._tokenizer = tokenizer
        self._pad_id = pad_id
        self._uses_type_ids = uses_type_ids
        self._temperature = dict(temperature)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Encoded]:
        """Cleans and tokenises texts as the training texts were, with their partners where the classifier takes pairs.

        Raises:
            InputError: pairs are missing or not asked for, or are not as many as the texts.
        """
        if self.spec.pair != (pairs is not None):
            raise InputError(f"the classifier takes {'pairs of texts' if self.spec.pair else 'single texts'}.")
        if pairs is not None and len(pairs) != len(texts):
            raise InputError(f"there are {len(texts)} texts but {len(pairs)} partners for them.")
        inputs: Sequence[str | tuple[str, str]]
        if pairs is None:
            inputs = cleaned([self._opening(text) for text in texts], self.spec.text)
        else:  # which part is cut depends on the whole lengths of both
            inputs = list(zip(cleaned(texts, self.spec.text), cleaned(pairs, self.spec.text), strict=True))
        wants_types = self._uses_type_ids and self.spec.pair
        return [
            Encoded(
                # A tokenizer without special tokens makes nothing of an empty text; a model needs something.
                ids=encoding.ids or [self._pad_id],
                type_ids=(encoding.type_ids or [0]) if wants_types else None,
                truncated=bool(encoding.overflowing),
            )
            for encoding in self._tokenizer.encode_batch(inputs)
        ]

    def _opening(self, text: str) -> str:
        """The first lines of a long text, where they hold all that the model reads of it; otherwise the text.

        Lines, since texts are cleaned line by line: so it is the same whether before or after the cut.
        """
        characters = _OPENING * self.spec.max_length
        while 0 < (end := text.find("\n", characters) + 1) < len(text):
            (encoding,) = self._tokenizer.encode_batch(cleaned([text[:end]], self.spec.text))
            if sum(len(part.ids) for part in (encoding, *encoding.overflowing)) >= self.spec.max_length + _SPARE:
                return text[:end]
            characters = 4 * end
        return text

    def logits(
        self,
        encoded: Sequence[Encoded],
        batch_tokens: int = 4096,
        progress: Callable[[int], None] | None = None,
    ) -> FloatArray:
        """The model's outputs, float32 [texts, total_classes], in the order given.

        Args:
            encoded: what `encode` made.
            batch_tokens: tokens of a batch at most, padding included.
            progress: told how many texts are done, after each batch.
        """
        outputs = np.empty((len(encoded), total_classes(self.spec.labels)), dtype=np.float32)
        done = 0
        # The longest first: a batch too large for the memory shows at once.
        for group in reversed(group_by_length([len(item.ids) for item in encoded], batch_tokens, self.max_padding)):
            outputs[group] = self.forward([encoded[index] for index in group])
            done += len(group)
            if progress:
                progress(done)
        return outputs

    @torch.inference_mode()
    def forward(self, batch: Sequence[Encoded]) -> FloatArray:
        """One batch as it is, padded to its longest: float32 [texts, total_classes]."""
        lengths = [len(item.ids) for item in batch]
        longest = max(lengths)
        inputs = {"input_ids": self._padded([item.ids for item in batch], longest, self._pad_id)}
        inputs["attention_mask"] = self._padded([[1] * length for length in lengths], longest, 0)
        if batch[0].type_ids is not None:
            inputs["token_type_ids"] = self._padded([item.type_ids or [] for item in batch], longest, 0)
        with autocast(self.device, self.precision):
            logits = self._model(**inputs).logits
        return np.asarray(logits.float().cpu().numpy(), dtype=np.float32)

    def _padded(self, rows: Sequence[list[int]], length: int, fill: int) -> torch.Tensor:
        padded = [row + [fill] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long).to(self.device, non_blocking=True)

    def probabilities(self, logits: FloatArray) -> dict[str, FloatArray]:
        """By label column, the calibrated probabilities, float32 [texts, classes of the column].

        Softmax, or sigmoid for a multi-label column, of the logits divided by the column's temperature.
        """
        return {
            column.name: _probabilities(logits[:, span] / self._temperature.get(column.name, 1.0), column)
            for column, span in spans(self.spec.labels)
        }

    def answers(self, encoded: Sequence[Encoded], logits: FloatArray) -> list[Answer]:
        """What the outputs say of each text."""
        by_column = self.probabilities(logits)
        return [
            Answer(
                labels={column.name: _predict(column, by_column[column.name][row]) for column in self.spec.labels},
                truncated=item.truncated,
                tokens=len(item.ids),
            )
            for row, item in enumerate(encoded)
        ]

    def classify(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Answer]:
        """The answer for each text, in the order given; see `encode` for what it raises."""
        encoded = self.encode(texts, pairs)
        return self.answers(encoded, self.logits(encoded))


def load_engine(
    folder: Path,
    *,
    precision: Precision = "bf16",
    threads: int | None = None,
    temperature: Mapping[str, float] | None = None,
) -> TorchEngine:
    """Loads the classifier in a local folder, onto a GPU where there is one.

    Args:
        folder: as `models.classifier.save` writes it.
        precision: where the hardware has no instructions for it, the next best is used; `engine.precision` tells.
        threads: CPU threads of this process, as torch sets by itself where None.
        temperature: by label column, what its logits are divided by; 1 where absent.

    Raises:
        InputError: the folder holds no classifier, a damaged one, or one without a fast tokenizer.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer, spec = load(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InputError(f"{folder} has no fast tokenizer: there must be a tokenizer.json in it.")
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_padding()
    backend.enable_truncation(spec.max_length)
    pad_id = set_padding(model, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = usable(precision, device)
    nn.Module.to(model, device).requires_grad_(False)
    if precision != "fp32":
        _store_weights_as(model, DTYPES[precision])
    return TorchEngine(
        model,
        backend,
        spec,
        precision=precision,
        pad_id=pad_id,
        uses_type_ids="token_type_ids" in tokenizer.model_input_names,
        temperature=temperature or {},
    )


def _store_weights_as(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds the matrices once: autocast would do so again at every call, which costs more than a short text."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)


def _probabilities(logits: FloatArray, column: LabelColumn) -> FloatArray:
    tensor = torch.from_numpy(np.ascontiguousarray(logits))
    return np.asarray((tensor.sigmoid() if column.multi else tensor.softmax(-1)).numpy(), dtype=np.float32)


def _predict(column: LabelColumn, probabilities: FloatArray) -> Prediction:
    if not np.isfinite(probabilities).all():
        return Prediction(label=None, probabilities={})
    values = dict(zip(column.classes, map(float, probabilities), strict=True))
    if column.multi:
        return Prediction([name for name, value in values.items() if value >= 0.5], values)
    return Prediction(column.classes[int(probabilities.argmax())], values)
