"""An engine: a loaded classifier, texts in and probabilities out.

`encode` -> `logits` -> `probabilities` are the three steps, apart so that a server can tokenise in one thread
and compute in another; `classify` is all of them. How a batch is computed is an engine's own: `models.torch_engine`,
`models.onnx_engine`. Texts are computed in groups of nearly equal length (`models.batches`) and answered in the order
given.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, softmax
from tokenizers import Tokenizer

from models.batches import group_by_length
from models.labels import LabelColumn, spans, total_classes
from models.redaction import REACH
from models.settings import InputError
from models.spec import ClassifierSpec
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


class Engine(ABC):
    """A classifier that is loaded. Not for use by several threads at once, but for `encode`."""

    name: str
    """Of the library that computes: torch or onnx."""
    precision: str
    """What it computes in, in fact."""
    device: str
    max_padding: float | None
    """The share of a batch that may be padding before it is slower than two batches; None where texts are computed one
    by one, whatever the batch."""

    def __init__(
        self,
        spec: ClassifierSpec,
        tokenizer: Tokenizer,
        *,
        pad_id: int,
        uses_type_ids: bool,
        temperature: Mapping[str, float],
    ) -> None:
        self.spec = spec
        self._tokenizer = tokenizer
        self._pad_id = pad_id
        self._uses_type_ids = uses_type_ids
        self._temperature = dict(temperature)

    @abstractmethod
    def forward(self, batch: Sequence[Encoded]) -> FloatArray:
        """One batch as it is: float32 [texts, total_classes]."""

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

        Lines, since texts are repaired line by line: so it is the same whether before or after the cut. What is masked
        may depend on a little of what follows; the part that could is not counted on.
        """
        characters = _OPENING * self.spec.max_length
        while 0 < (end := text.find("\n", characters) + 1) < len(text):
            (opening,) = cleaned([text[:end]], self.spec.text)
            sure = opening[: max(len(opening) - REACH, 0)] if self.spec.text.redact else opening
            (encoding,) = self._tokenizer.encode_batch([sure])
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
        for group in reversed(
            group_by_length([len(item.ids) for item in encoded], batch_tokens, self.max_padding or 0)
        ):
            outputs[group] = self.forward([encoded[index] for index in group])
            done += len(group)
            if progress:
                progress(done)
        return outputs

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


def _probabilities(logits: FloatArray, column: LabelColumn) -> FloatArray:
    found: FloatArray = expit(logits) if column.multi else softmax(logits, axis=-1)
    return found


def _predict(column: LabelColumn, probabilities: FloatArray) -> Prediction:
    if not np.isfinite(probabilities).all():
        return Prediction(label=None, probabilities={})
    values = dict(zip(column.classes, map(float, probabilities), strict=True))
    if column.multi:
        return Prediction([name for name, value in values.items() if value >= 0.5], values)
    return Prediction(column.classes[int(probabilities.argmax())], values)
