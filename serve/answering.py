"""From texts to the model's outputs in one replica: tokenising where it is cheapest, then the queue."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from models.engine import Answer, Encoded, Engine, FloatArray
from serve.batching import Batcher, QueueFullError
from serve.drift import DriftMonitor
from serve.metrics import ServeMetrics
from serve.problems import ProblemError
from serve.settings import ServeSettings

_INLINE_CHARACTERS = 1024
"""Up to here tokenising takes less time than handing the texts to a thread and back."""

_SLICE_CHARACTERS = 16384
"""About what is tokenised of one request before it is another's turn: some 20 ms. Single texts above it have a thread
of their own, so that only their like wait for them."""


@dataclass(frozen=True)
class Outputs:
    """What the model said of a request's texts, in their order."""

    encoded: list[Encoded]
    logits: FloatArray
    """[texts, classes of all label columns]."""
    answers: list[Answer]
    """What the logits say."""


class Answerer:
    """The way of every request's texts through one replica, whatever shape it came in."""

    def __init__(self, engine: Engine, settings: ServeSettings, metrics: ServeMetrics, drift: DriftMonitor) -> None:
        self.engine = engine
        self.batcher = Batcher(
            engine.forward, settings.batch_tokens, settings.max_queued, engine.max_padding, metrics.batch
        )
        self._metrics = metrics
        self._drift = drift
        self._encoder, self._long_encoder = ThreadPoolExecutor(1, "encode"), ThreadPoolExecutor(1, "encode-long")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A request's place in the queue: from before any work is spent on it until it is answered or given up.

        Raises:
            ProblemError: 429, there is none; `Retry-After` says when to come again.
        """
        try:
            with self.batcher.place():
                yield
        except QueueFullError as full:
            retry = {"Retry-After": str(full.retry_after_s)}
            raise ProblemError(429, f"Too many requests wait; try again in {full.retry_after_s} s.", retry) from None

    async def compute(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Outputs:
        """The outputs for the texts (and their partners, where the model takes pairs); cancel it to give up waiting."""
        encoded = await self._encode(texts, pairs)
        logits = await self.batcher.submit(encoded)
        self._metrics.classified(len(encoded), sum(item.truncated for item in encoded))
        outputs = Outputs(encoded, logits, self.engine.answers(encoded, logits))
        self._drift.observe(encoded, outputs.answers)
        return outputs

    async def _encode(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Encoded]:
        lengths = [len(text) for text in texts]
        if pairs is not None:
            lengths = [length + len(pair) for length, pair in zip(lengths, pairs, strict=True)]
        if sum(lengths) <= _INLINE_CHARACTERS:
            return self.engine.encode(texts, pairs)
        encoded: list[Encoded] = []
        for part in _slices(lengths):
            partners = None if pairs is None else pairs[part]
            thread = self._encoder if sum(lengths[part]) <= _SLICE_CHARACTERS else self._long_encoder
            work = asyncio.get_running_loop().run_in_executor(thread, self.engine.encode, texts[part], partners)
            encoded += await work  # a client that has gone is noticed here
        return encoded


def _slices(lengths: Sequence[int]) -> Iterator[slice]:
    """The texts in turn: as many at a time as `_SLICE_CHARACTERS` hold, one at least."""
    start, size = 0, 0
    for index, length in enumerate(lengths):
        if index > start and size + length > _SLICE_CHARACTERS:
            yield slice(start, index)
            start, size = index, 0
        size += length
    yield slice(start, len(lengths))
