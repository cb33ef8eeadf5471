"""Which words of a text speak for a label: integrated gradients.

(Sundararajan, Taly, Yan 2017, "Axiomatic Attribution for Deep Networks", arXiv 1703.01365; computed by Captum's
LayerIntegratedGradients.) The text's word embeddings are moved in a straight line from a baseline, the same text with
the padding token in place of each token that is not the tokenizer's own, to where they are. The gradient of the label's
logit on the way, times the way, says what each number of each embedding brought; summed over a token's embedding and
over a word's tokens it is the word's attribution. All of them add up to f(text) - f(baseline) (completeness), but for
the error of the numerical integral, which is measured and told.

It is the logit that is explained, before any temperature, not the probability: where the model is sure, the probability
hardly changes, its gradient vanishes and the integral is decided on a short piece of the way; and a probability of
several classes goes up as well by what speaks against the others. The logit of a class of a multi-label column is its
log-odds; that of a class of any other column means something only beside the logits of the column's other classes.

Cost: a forward and a backward pass over the text for each step, twice as many steps in each try as in the one before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from captum.attr import LayerIntegratedGradients
from numpy.typing import NDArray
from tokenizers import Encoding
from torch import Tensor, nn

from models.engine import Encoded, FloatArray
from models.labels import find_class
from models.redaction import RedactionSettings
from models.settings import InputError
from models.torch_engine import TorchEngine, load_torch_engine
from models.words import Word, words_of

TOLERANCE = 0.05
"""The relative error of completeness that is small enough."""

_LEAST_DIFFERENCE = 0.02
"""Differences of logits below it are as good as none: errors are measured against it."""


class UnexplainableError(InputError):
    """The classifier is of a kind that cannot be explained, whatever the text."""


@dataclass(frozen=True, slots=True)
class Attribution:
    """What a word brought to the label's logit."""

    text: str
    source: Literal["text", "pair"]
    """Which of the two texts it is of."""
    start: int
    end: int
    """Its characters in the cleaned text: `explanation.text[start:end]` is the word."""
    attribution: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the words of one text say about one label."""

    text: str
    """The cleaned text, as the model reads it; of a long one, no less than is read."""
    pair: str | None
    """Its cleaned partner, where the classifier takes pairs."""
    column: str
    label: str
    probability: float
    """The label's, calibrated."""
    words: tuple[Attribution, ...]
    """In their order; words beyond the model's length are not among them."""
    total: float
    """The sum of the attributions of all tokens."""
    difference: float
    """The label's logit for the text less that for the baseline."""
    error: float
    """Of completeness: |total - difference|."""
    relative_error: float
    """The error over |difference|, or over 0.02 where the difference is less."""
    steps: int
    """Of the numerical integral, in the last try."""
    truncated: bool
    tokens: int


class Explainer:
    """Explains what a classifier says. Not for use by several threads at once.

    Args:
        folder: as `models.classifier.save` writes it; it is computed in fp32, on a GPU where there is one.
        temperature: by label column, what its logits are divided by for the probability; 1 where absent.
        threads: CPU threads of this process, as torch sets by itself where None.
        batch_tokens: tokens computed at once at most, so that memory is bounded; a longer text is computed alone.
        redact: masks every text besides, as `Engine.also_mask` says.

    Raises:
        InputError: the folder holds no classifier, a damaged one, or one without a fast tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        temperature: Mapping[str, float] | None = None,
        *,
        threads: int | None = None,
        batch_tokens: int = 1024,
        redact: RedactionSettings | None = None,
    ) -> None:
        self._engine = load_torch_engine(folder, precision="fp32", threads=threads, temperature=temperature)
        self._engine.also_mask(redact)
        self._batch_tokens = batch_tokens
        self._embeddings = _word_embeddings(self._engine)

    def explain(
        self,
        text: str,
        pair: str | None = None,
        column: str | None = None,
        label: str | None = None,
        steps: int = 16,
        max_steps: int = 256,
        before_batch: Callable[[], None] = lambda: None,
    ) -> Explanation:
        """What each word of the text, and of its partner, brought to the label's logit.

        Args:
            text: the text.
            pair: its partner, where the classifier takes pairs.
            column: the label column; may be None where there is one only.
            label: one of its classes; by default the likeliest.
            steps: of the integral, at first (Gauss-Legendre); doubled until the relative error is under `TOLERANCE`.
            max_steps: at most.
            before_batch: called before each batch is computed; what it raises ends the explanation.

        Raises:
            InputError: there is no such column or label, a partner is missing or not asked for, or the model gives no
                finite numbers or gradients.
            UnexplainableError: the model does not embed each token just once.
        """
        chosen, span, place = find_class(self._engine.spec.labels, column, label)
        ((cleaned, encoding),) = self._engine.tokenised([text], None if pair is None else [pair])
        texts = (cleaned,) if isinstance(cleaned, str) else cleaned
        item = self._engine.encoded(encoding)
        way = self._way(item, encoding, before_batch)
        at_text, at_baseline = way.ends()
        probabilities = self._engine.probabilities(at_text)[chosen.name][0]
        if not np.isfinite(probabilities).all() or not np.isfinite(at_baseline).all():
            raise InputError("the model gives no finite numbers for this text, so there is nothing to explain.")
        place = int(probabilities.argmax()) if place is None else place
        target = span.start + place
        difference = float(at_text[0, target]) - float(at_baseline[0, target])
        while True:
            tokens = way.attributions(target, steps, self._batch_tokens)
            if not np.isfinite(tokens).all():
                raise InputError("the model gives no finite gradients for this text, so there is nothing to explain.")
            error = abs(float(tokens.sum()) - difference)
            relative = error / max(abs(difference), _LEAST_DIFFERENCE)
            if relative < TOLERANCE or steps >= max_steps:
                break
            steps = min(2 * steps, max_steps)
        return Explanation(
            text=texts[0],
            pair=texts[1] if len(texts) > 1 else None,
            column=chosen.name,
            label=chosen.classes[place],
            probability=float(probabilities[place]),
            words=tuple(_attribution(word, texts, tokens) for word in words_of(encoding, texts)),
            total=float(tokens.sum()),
            difference=difference,
            error=error,
            relative_error=relative,
            steps=steps,
            truncated=item.truncated,
            tokens=len(item.ids),
        )

    def _way(self, item: Encoded, encoding: Encoding, before_batch: Callable[[], None]) -> "_Way":
        if self._embeddings is None:
            kind = self._engine.model.config.model_type
            raise UnexplainableError(f"{kind} classifiers cannot be explained: they do not embed each token just once.")
        inputs = self._engine.inputs([item])
        ids = inputs.pop("input_ids")
        # The lone padding token of an empty text is in no encoding.
        added = torch.tensor([encoding.special_tokens_mask or [0]], dtype=torch.bool, device=ids.device)

        def logits(ids: Tensor, *others: Tensor) -> Tensor:
            before_batch()
            named = dict(zip(inputs, others, strict=True))
            found: Tensor = self._engine.model(input_ids=ids, **named).logits
            return found

        baseline = torch.where(added, ids, self._engine.pad_id)
        return _Way(logits, self._embeddings, ids, baseline, tuple(inputs.values()))


@dataclass(frozen=True)
class _Way:
    """The straight line from the baseline's embeddings to the text's."""

    logits: Callable[..., Tensor]
    """Of ids and the model's other inputs: [texts, total_classes]."""
    embeddings: nn.Module
    ids: Tensor
    """[1, tokens]."""
    baseline: Tensor
    """[1, tokens]."""
    others: tuple[Tensor, ...]
    """The model's other inputs, each [1, tokens]."""

    @torch.no_grad()
    def ends(self) -> tuple[FloatArray, FloatArray]:
        """The logits at the text and at the baseline, [1, total_classes] each.

        All that a model takes from the ids themselves (RoBERTa its positions, a decoder where the text ends) is on the
        whole way, and so at the baseline, as it is for the text.
        """
        at_text = self.logits(self.ids, *self.others)
        start = self.embeddings(self.baseline)
        hook = self.embeddings.register_forward_hook(lambda *_: start)
        try:
            at_baseline = self.logits(self.ids, *self.others)
        finally:
            hook.remove()
        return at_text.cpu().numpy(), at_baseline.cpu().numpy()

    def attributions(self, target: int, steps: int, batch_tokens: int) -> NDArray[np.float64]:
        """What each token brings to the target's logit, [tokens]."""
        found = LayerIntegratedGradients(self.logits, self.embeddings).attribute(
            self.ids,
            self.baseline,
            target=target,
            additional_forward_args=self.others,
            n_steps=steps,
            internal_batch_size=max(1, batch_tokens // self.ids.shape[1]),
        )
        tokens: NDArray[np.float64] = found[0].double().sum(-1).cpu().numpy()
        return tokens


def _word_embeddings(engine: TorchEngine) -> nn.Module | None:
    """The module from which the model takes the embedding of each token, once; None where there is none.

    An encoder with a decoder reads each text twice.
    """
    try:
        embeddings: nn.Module = engine.model.get_input_embeddings()
    except NotImplementedError:
        return None
    seen: list[tuple[int, ...]] = []
    hook = embeddings.register_forward_hook(lambda _module, _given, output: seen.append(tuple(output.shape[:-1])))
    inputs = engine.inputs(engine.encode(["word"], ["word"] if engine.spec.pair else None))
    try:
        with torch.no_grad():
            engine.model(**inputs)
    finally:
        hook.remove()
    return embeddings if seen == [tuple(inputs["input_ids"].shape)] else None


def _attribution(word: Word, texts: tuple[str, ...], tokens: NDArray[np.float64]) -> Attribution:
    return Attribution(
        text=texts[word.source][word.start : word.end],
        source="pair" if word.source else "text",
        start=word.start,
        end=word.end,
        attribution=float(tokens[word.tokens].sum()),
    )
