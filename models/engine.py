"""An engine: a loaded classifier, texts in and probabilities out.

`encode` -> `logits` -> `probabilities` are the three steps, apart so that a server can tokenise in one thread
and compute in another; `classify` is all of them. How a batch is computed is an engine's own: `models.torch_engine`,
`models.onnx_engine`. Texts are computed in groups of nearly equal length (`models.batches`) and answered in the order
given.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from tokenizers import Encoding, Tokenizer

from models.batches import group_by_length
from models.labels import LabelColumn, spans, total_classes
from models.redaction import REACH, RedactionSettings, Redactor
from models.settings import InputError
from models.spec import ClassifierSpec
from models.text import cleaned

_OPENING = 32
"""Characters for each token of max_length that are read of a long text at first."""

_SPARE = 64
"""Tokens beyond max_length that the read part of a long text must have: where a tokenizer's words do not end at spaces,
the last few tokens before the cut may be others than in the whole text."""

FloatArray = npt.NDArray[np.float32]

Cleaned = str | tuple[str, str]
"""A cleaned text, or a pair of them."""


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
    """Whether its end was not read."""
    tokens: int
    windows: int = 1
    """Parts in which it was read."""


class Engine(ABC):
    """A classifier that is loaded. For use by as many threads at once as it has lanes; `encode`, by any number."""

    name: str
    """Of the library that computes: torch or onnx."""
    precision: str
    """What it computes in, in fact."""
    device: str
    max_padding: float | None
    """The share of a batch that may be padding before it is slower than two batches; None where nothing is ever padded,
    whatever the batch."""
    turn_tokens: int | None = None
    """Where nothing is ever padded: the tokens beyond which a larger batch is no faster; None where it always is."""
    lanes: int = 1
    """Batches that may be computed at once."""

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
        self.tokenizer = tokenizer
        self.pad_id = pad_id
        self.uses_type_ids = uses_type_ids
        self._temperature = dict(temperature)
        self._also_masks: Redactor | None = None

    def also_mask(self, redact: RedactionSettings | None) -> None:
        """Has every text masked by these settings too, after it was cleaned as the training texts were."""
        self._also_masks = redact.redactor if redact else None

    def difference(self, other: "Engine") -> str:
        """What the other has otherwise of what texts are read by and answered with; nothing if all is the same."""
        own, its = self.spec, other.spec
        read = self.tokenizer.to_str(), self.uses_type_ids
        found = {
            "set of labels": own.labels != its.labels,
            "max_length": own.max_length != its.max_length,
            "kind of texts (pairs or single ones)": own.pair != its.pair,
            "cleaning of texts": own.text != its.text,
            "tokenizer": read != (other.tokenizer.to_str(), other.uses_type_ids),
        }
        return next((name for name, differs in found.items() if differs), "")

    @cached_property
    def unknown_id(self) -> int | None:
        """The token for what the vocabulary lacks; None where it lacks nothing."""
        return unknown_id(self.tokenizer)

    @abstractmethod
    def forward(self, batch: Sequence[Encoded]) -> FloatArray:
        """One batch as it is: float32 [texts, total_classes]."""

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Encoded]:
        """Cleans and tokenises texts as the training texts were, with their partners where the classifier takes pairs.

        Raises:
            InputError: pairs are missing or not asked for, or are not as many as the texts.
        """
        return [self.encoded(encoding) for _, encoding in self.tokenised(texts, pairs)]

    def tokenised(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[tuple[Cleaned, Encoding]]:
        """Each text as it was cleaned, with its tokens and their places in it; see `encode` for what it raises.

        Of a long text, only the opening that the model reads may be there.
        """
        if self.spec.pair != (pairs is not None):
            raise InputError(f"the classifier takes {'pairs of texts' if self.spec.pair else 'single texts'}.")
        if pairs is not None and len(pairs) != len(texts):
            raise InputError(f"there are {len(texts)} texts but {len(pairs)} partners for them.")
        inputs: Sequence[Cleaned]
        if pairs is None:
            inputs = self._cleaned([self._opening(text, self.spec.max_length) for text in texts])
        else:  # which part is cut depends on the whole lengths of both
            inputs = list(zip(self._cleaned(texts), self._cleaned(pairs), strict=True))
        return list(zip(inputs, self.tokenizer.encode_batch(inputs), strict=True))

    def encoded(self, encoding: Encoding, truncated: bool | None = None) -> Encoded:
        """The tokens of one text (or pair) as the model reads them; `truncated` where the encoding does not tell."""
        wants_types = self.uses_type_ids and self.spec.pair
        return Encoded(
            # A tokenizer without special tokens makes nothing of an empty text; a model needs something.
            ids=encoding.ids or [self.pad_id],
            type_ids=(encoding.type_ids or [0]) if wants_types else None,
            truncated=bool(encoding.overflowing) if truncated is None else truncated,
        )

    def encode_windows(self, texts: Sequence[str], most: int) -> list[list[Encoded]]:
        """Cleans and tokenises single texts, a long one as windows that overlap by an eighth; `most` of each text.

        `truncated` of a text's last window says whether there would have been more.

        Raises:
            InputError: the classifier takes pairs.
        """
        if self.spec.pair:
            raise InputError("the classifier takes pairs of texts, which are not read in windows.")
        inputs = self._cleaned([self._opening(text, most * self.spec.max_length) for text in texts])
        found = []
        for encoding in self._window_tokenizer.encode_batch(inputs):
            windows = [encoding, *encoding.overflowing]
            last = min(len(windows), most) - 1
            found.append([self.encoded(each, last < len(windows) - 1) for each in windows[: last + 1]])
        return found

    @cached_property
    def _window_tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.enable_truncation(self.spec.max_length, stride=self.spec.max_length // 8)
        return tokenizer

    def _cleaned(self, texts: Sequence[str]) -> list[str]:
        found = cleaned(texts, self.spec.text)
        return self._also_masks.redact_all(found) if self._also_masks else found

    def _opening(self, text: str, tokens: int) -> str:
        """The first lines of a long text, where they hold the `tokens` that the model reads of it; otherwise the text.

        Lines, since texts are repaired line by line: so it is the same whether before or after the cut. What is masked
        may depend on a little of what follows; the part that could is not counted on.
        """
        characters = _OPENING * tokens
        while 0 < (end := text.find("\n", characters) + 1) < len(text):
            (opening,) = self._cleaned([text[:end]])
            masked = self.spec.text.redact or self._also_masks
            sure = opening[: max(len(opening) - REACH, 0)] if masked else opening
            (encoding,) = self.tokenizer.encode_batch([sure])
            if sum(len(part.ids) for part in (encoding, *encoding.overflowing)) >= tokens + _SPARE:
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
            batch_tokens: tokens of a batch at most, padding included; fewer where more are no faster.
            progress: told how many texts are done, after each batch.
        """
        outputs = np.empty((len(encoded), total_classes(self.spec.labels)), dtype=np.float32)
        done = 0
        lengths = [len(item.ids) for item in encoded]
        # The longest first: a batch too large for the memory shows at once.
        for group in reversed(
            group_by_length(lengths, min(batch_tokens, self.turn_tokens or batch_tokens), self.max_padding)
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
            self.answer(
                {name: values[row] for name, values in by_column.items()},
                tokens=len(item.ids),
                truncated=item.truncated,
            )
            for row, item in enumerate(encoded)
        ]

    def answer(
        self, probabilities: Mapping[str, FloatArray], *, tokens: int, truncated: bool, windows: int = 1
    ) -> Answer:
        """What one text's probabilities say, [classes] of each label column."""
        labels = {column.name: _predict(column, probabilities[column.name]) for column in self.spec.labels}
        return Answer(labels, truncated, tokens, windows)

    def classify(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Answer]:
        """The answer for each text, in the order given; see `encode` for what it raises."""
        encoded = self.encode(texts, pairs)
        return self.answers(encoded, self.logits(encoded))


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id of the tokenizer's unknown token; None where it has none, as one that goes down to bytes."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    found: int | None = model.get("unk_id") if token is None else tokenizer.token_to_id(token)
    return found


def _probabilities(logits: FloatArray, column: LabelColumn) -> FloatArray:
    if column.multi:
        found: FloatArray = expit(logits)
    else:  # SciPy's softmax does the same, but takes five times as long for one text
        found = np.exp(logits - logits.max(axis=-1, keepdims=True))
        found /= found.sum(axis=-1, keepdims=True)
    return found


def _predict(column: LabelColumn, probabilities: FloatArray) -> Prediction:
    if not np.isfinite(probabilities).all():
        return Prediction(label=None, probabilities={})
    values = dict(zip(column.classes, map(float, probabilities), strict=True))
    if column.multi:
        return Prediction([name for name, value in values.items() if value >= 0.5], values)
    return Prediction(column.classes[int(probabilities.argmax())], values)
