"""From texts to the model's outputs in one replica: tokenising where it is cheapest, then the queue."""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from models.engine import Answer, Encoded, Engine, FloatArray
from models.settings import InputError
from serve.batching import Batcher, QueueFullError
from serve.drift import DriftMonitor
from serve.metrics import ServeMetrics
from serve.problems import ProblemError
from serve.settings import ServeSettings
from serve.shedding import FULL, is_lasting

_INLINE_CHARACTERS = 1024
"""Up to here tokenising takes less time than handing the texts to a thread and back."""

_SLICE_CHARACTERS = 16384
"""About what is tokenised of one request before it is another's turn: some 20 ms. Single texts above it have a thread
of their own, so that only their like wait for them."""


@dataclass(frozen=True)
class Outputs:
    """What the model said of a request's texts, in their order."""

    encoded: list[list[Encoded]]
    """The windows of each text: one, where it is not longer than the model reads."""
    logits: FloatArray
    """[texts, classes of all label columns]."""
    answers: list[Answer]
    """What they say; nothing where that is not sure enough."""
    waited_s: float
    """Seconds in the queue, until the first text was computed."""

    @property
    def truncated(self) -> list[bool]:
        """Of each text, whether its end was not read."""
        return [windows[-1].truncated for windows in self.encoded]


class Answerer:
    """The way of every request's texts through one replica, whatever shape it came in."""

    def __init__(
        self,
        engine: Engine,
        settings: ServeSettings,
        metrics: ServeMetrics,
        drift: DriftMonitor,
        thresholds: Mapping[str, float],
        *,
        sheds_at_front: bool = False,
    ) -> None:
        self.engine = engine
        self._thresholds = thresholds
        self._max_wait_s = settings.max_wait_s if sheds_at_front else None
        self._other = settings.abstain.label if settings.abstain else None
        self.batcher = Batcher(
            engine.forward,
            settings.batch_tokens,
            settings.max_queued,
            engine.max_padding,
            metrics.batch,
            settings.max_wait_s,
            turn_tokens=engine.turn_tokens,
            lanes=engine.lanes,
        )
        self._metrics = metrics
        self._drift = drift
        self._windows = settings.long_texts
        self._max_windows = settings.max_windows
        if engine.spec.pair and settings.long_texts != "truncate":
            raise InputError(
                f"serve.long_texts is {settings.long_texts}, but the classifier takes pairs of texts, which are not "
                "read in windows; set it to truncate."
            )
        self._encoder, self._long_encoder = ThreadPoolExecutor(1, "encode"), ThreadPoolExecutor(1, "encode-long")

    @contextlib.contextmanager
    def place(self, timeout_s: float | None = None) -> Iterator[None]:
        """A request's place in the queue: from before any work is spent on it until it is answered or given up.

        `timeout_s`: the client waits no longer than this.

        Raises:
            ProblemError: 429, there is none, or it would be in vain; `Retry-After` says when to come again.
        """
        try:
            with self.batcher.place(timeout_s):
                yield
        except QueueFullError as full:
            headers = {"Retry-After": str(full.retry_after_s)}
            if self._max_wait_s is not None and not full.late and is_lasting(full.wait_s, self._max_wait_s):
                headers[FULL] = "1"
            why = (
                "Too many requests wait to be answered within the time given" if full.late else "Too many requests wait"
            )
            raise ProblemError(429, f"{why}; try again in {full.retry_after_s} s.", headers) from None

    async def compute(
        self, texts: Sequence[str], pairs: Sequence[str] | None, timeout_s: float | None = None
    ) -> Outputs:
        """The outputs for the texts (and their partners, where the model takes pairs); cancel it to give up waiting.

        Raises:
            QueueFullError: it cannot be done within `timeout_s`; inside `place`, that becomes a 429.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        encoded = await self._encode(texts, pairs)
        flat = [window for windows in encoded for window in windows]
        waits: list[float] = []
        logits = await self.batcher.submit(flat, deadline, waits.append)
        if len(flat) > len(encoded):
            starts = np.cumsum([0, *(len(windows) for windows in encoded[:-1])])
            logits = self._joined(logits, starts)
        answers = self._answers(encoded, logits)
        # Drift is told by what the model says, as the reference was: before anything is left unanswered.
        self._drift.observe([windows[0] for windows in encoded], answers)
        if self._thresholds:
            answers = [self._abstained(each) for each in answers]
        outputs = Outputs(encoded, logits, answers, waits[0])
        self._metrics.classified(len(encoded), sum(outputs.truncated))
        return outputs

    def _joined(self, logits: FloatArray, starts: npt.NDArray[np.int64]) -> FloatArray:
        """One row of outputs for each text from those of its windows, the first of which are at `starts`."""
        if self._windows == "max":
            found: FloatArray = np.maximum.reduceat(logits, starts)
            return found
        counts = np.diff([*starts, len(logits)]).astype(np.float32)
        mean: FloatArray = np.divide(np.add.reduceat(logits, starts), counts[:, None], dtype=np.float32)
        return mean

    def _answers(self, encoded: Sequence[Sequence[Encoded]], logits: FloatArray) -> list[Answer]:
        by_column = self.engine.probabilities(logits)
        return [
            self.engine.answer(
                {name: values[row] for name, values in by_column.items()},
                tokens=sum(len(window.ids) for window in windows),
                truncated=windows[-1].truncated,
                windows=len(windows),
            )
            for row, windows in enumerate(encoded)
        ]

    def _abstained(self, answer: Answer) -> Answer:
        """The answer without what is below its column's threshold."""
        labels = {
            name: replace(said, label=self._other)
            if said.probabilities and max(said.probabilities.values()) < self._thresholds.get(name, 0.0)
            else said
            for name, said in answer.labels.items()
        }
        return replace(answer, labels=labels)

    async def _encode(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[list[Encoded]]:
        lengths = [len(text) for text in texts]
        if pairs is not None:
            lengths = [length + len(pair) for length, pair in zip(lengths, pairs, strict=True)]
        if sum(lengths) <= _INLINE_CHARACTERS:
            return self._encode_now(texts, pairs)
        encoded: list[list[Encoded]] = []
        for part in _slices(lengths):
            partners = None if pairs is None else pairs[part]
            thread = self._encoder if sum(lengths[part]) <= _SLICE_CHARACTERS else self._long_encoder
            work = asyncio.get_running_loop().run_in_executor(thread, self._encode_now, texts[part], partners)
            encoded += await work  # a client that has gone is noticed here
        return encoded

    def _encode_now(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[list[Encoded]]:
        if self._windows == "truncate":
            return [[item] for item in self.engine.encode(texts, pairs)]
        return self.engine.encode_windows(texts, self._max_windows)


def _slices(lengths: Sequence[int]) -> Iterator[slice]:
    """The texts in turn: as many at a time as `_SLICE_CHARACTERS` hold, one at least."""
    start, size = 0, 0
    for index, length in enumerate(lengths):
        if index > start and size + length > _SLICE_CHARACTERS:
            yield slice(start, index)
            start, size = index, 0
        size += length
    yield slice(start, len(lengths))
