"""Which waiting texts to compute next: a deque, one loop, batches under a token budget.

The batch that is computed next always holds the text that has waited longest. Where the engine pads nothing, those that
have waited longest after it stand beside it, of whatever length; else those waiting texts of about its length that fit
the budget. So nothing starves: a text with k texts before it is computed after at most k batches, however long or
short the others are. Nothing ever waits for a batch to fill.

The computing happens in threads of its own, the lanes, each with one batch at a time; meanwhile texts gather. Whoever
gave up (a dropped connection) is skipped. A choice costs a sort of at most `WINDOW` lengths; none where nothing is
padded.

How long a text would wait is predicted: the tokens before it by the tokens a second that the engine has lately
computed. Who would wait longer than is allowed, or than the client itself allows, is told at once.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from models.batches import CPU_PADDING, group_by_length
from models.engine import Encoded, FloatArray
from serve.workload import Load, Workload

WINDOW = 1024
"""Of how many of the longest waiting texts a batch is chosen."""

_MAX_RETRY_S = 60

_Tell = Callable[[float], None] | None


class QueueFullError(Exception):
    """A request would wait too long, or there are too many already."""

    def __init__(self, retry_after_s: int, wait_s: float, *, late: bool = False) -> None:
        super().__init__(f"too many requests wait; try again in {retry_after_s} s")
        self.wait_s = wait_s
        """How long those that wait will have to."""
        self.retry_after_s = retry_after_s
        """When, at the present speed, the queue will have been worked off."""
        self.late = late
        """Whether it is the client's own deadline that cannot be met."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What one batch was, for the metrics."""

    texts: int
    tokens: int
    padded_tokens: int
    """What was computed: texts times the longest, where they are padded; else their tokens."""
    seconds: float
    waits: tuple[float, ...] = ()
    """Seconds from submit to the start of this batch, of each request whose first text is in it."""


@dataclass(slots=True, eq=False)
class _Request:
    answered: "asyncio.Future[FloatArray]"
    rows: list[FloatArray | None]
    deadline: float | None
    submitted: float
    on_start: _Tell
    missing: int = field(init=False)
    started: bool = False

    def __post_init__(self) -> None:
        self.missing = len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    item: Encoded
    request: _Request
    position: int


class Batcher:
    """Gathers the texts of all requests and computes them batch by batch, in the running event loop.

    Args:
        compute: one batch in, float32 [texts, classes] out; called in a thread, never more than `lanes` times at once.
        batch_tokens: tokens of a batch at most, padding included.
        max_queued: requests that may be in progress at once.
        max_wait_s: seconds that a request may have to wait before it is computed.
        max_padding: the share of a batch that may be padding; None where `compute` pads nothing, whatever the batch.
        report: told of each batch after it.
        turn_tokens: where nothing is padded, the tokens beyond which a larger batch is no faster: texts beyond them
            come in the next one, and those before them are answered the sooner.
        lanes: batches that are computed at once.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Encoded]], FloatArray],
        batch_tokens: int,
        max_queued: int,
        max_padding: float | None = CPU_PADDING,
        report: Callable[[BatchReport], None] = lambda _: None,
        max_wait_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        turn_tokens: int | None = None,
        lanes: int = 1,
    ) -> None:
        self._compute = compute
        self._free = lanes
        self._starting = 0
        self._turn_tokens = min(batch_tokens, turn_tokens or batch_tokens)
        self._batch_tokens = batch_tokens
        self._max_queued = max_queued
        self._max_padding = max_padding
        self._max_wait_s = max_wait_s
        self._clock = clock
        self.report = report
        self._waiting: deque[_Text] = deque()
        self._requests = 0
        self.workload = Workload(clock, lanes)
        self._threads = ThreadPoolExecutor(lanes, thread_name_prefix="engine")
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def queued(self) -> int:
        """Requests not yet answered."""
        return self._requests

    @property
    def _wait_s(self) -> float:
        """How long a text that comes now will wait."""
        return 0.0 if self._free and not self._waiting else self.workload.wait_s

    def load(self) -> Load:
        """What there was to do since the last call."""
        return self.workload.load(self._requests)

    @contextlib.contextmanager
    def place(self, timeout_s: float | None = None) -> Iterator[None]:
        """A request's place in the queue: from before any work is spent on it until it is answered or given up.

        `timeout_s`: the client waits no longer than this.

        Raises:
            QueueFullError: all `max_queued` places are taken, or it would wait too long.
        """
        self.workload.came()
        wait = self._wait_s
        late = timeout_s is not None and wait > timeout_s
        if late or wait > self._max_wait_s or self._requests >= self._max_queued:
            raise self._refusal(late=late)
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def submit(
        self, items: Sequence[Encoded], deadline: float | None = None, on_start: _Tell = None
    ) -> FloatArray:
        """The outputs of one request's texts, float32 [texts, classes]; cancel it to give up waiting.

        `deadline`: by the batcher's clock; what has not begun by then is not computed any more.
        `on_start`: told how many seconds the first text had to wait, when it is computed.

        Raises:
            ValueError: there are no texts.
            QueueFullError: the deadline cannot be met, or has passed.
            Exception: whatever computing one of its batches raised.
        """
        if not items:
            raise ValueError("a request has at least one text")
        loop = asyncio.get_running_loop()
        tokens = sum(len(item.ids) for item in items)
        until = self._clock() + self._wait_s + self.workload.seconds_for(tokens, len(items))
        if deadline is not None and until > deadline:
            raise self._refusal(late=True)
        request = _Request(loop.create_future(), [None] * len(items), deadline, self._clock(), on_start)
        self.workload.submitted(tokens)
        self._waiting.extend(_Text(item, request, position) for position, item in enumerate(items))
        self._start(min(self._free, len(items)))
        try:
            return await request.answered
        finally:
            self.workload.left(tokens)

    def close(self) -> None:
        """Stops after the batch under way; requests still waiting are cancelled."""
        for task in self._tasks:
            task.cancel()
        for text in self._waiting:
            text.request.answered.cancel()
        self._waiting.clear()
        self._threads.shutdown(wait=False)

    def _start(self, lanes: int) -> None:
        self._free -= lanes
        self._starting += lanes
        for _ in range(lanes):
            task = asyncio.get_running_loop().create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        """One lane, until nothing waits."""
        self._starting -= 1
        try:
            while batch := self._next_batch():
                try:
                    await self._answer(batch)
                except Exception as error:
                    for text in batch:
                        if not text.request.answered.done():
                            text.request.answered.set_exception(error)
        finally:
            self._free += 1

    async def _answer(self, batch: Sequence[_Text]) -> None:
        started = self._clock()
        waits = _waits(batch, started)
        items = [text.item for text in batch]
        outputs = await asyncio.get_running_loop().run_in_executor(self._threads, self._compute, items)
        self._deliver(batch, outputs, self._clock() - started, waits)

    def _next_batch(self) -> list[_Text]:
        """Takes the longest waiting text and its batch out of the queue; empty when nothing waits."""
        if self._max_padding is None:
            return self._next_turn()
        window: list[_Text] = []
        while self._waiting and len(window) < WINDOW:
            text = self._waiting.popleft()
            if self._is_wanted(text.request):
                window.append(text)
        if not window:
            return []
        groups = group_by_length([len(text.item.ids) for text in window], self._batch_tokens, self._max_padding)
        chosen = set(next(group for group in groups if 0 in group))
        self._waiting.extendleft(window[index] for index in reversed(range(len(window))) if index not in chosen)
        return [window[index] for index in sorted(chosen)]

    def _next_turn(self) -> list[_Text]:
        """The longest waiting texts, where nothing is gained by what stands beside a text."""
        turn: list[_Text] = []
        tokens = 0
        share = math.ceil(len(self._waiting) / (1 + self._starting))  # Lanes that are about to start get theirs.
        while self._waiting and len(turn) < share:
            text = self._waiting[0]
            wanted = self._is_wanted(text.request)
            if wanted and turn and tokens + len(text.item.ids) > self._turn_tokens:
                break
            self._waiting.popleft()
            if wanted:
                turn.append(text)
                tokens += len(text.item.ids)
        return turn

    def _is_wanted(self, request: _Request) -> bool:
        """Whether somebody still waits for it, and in time."""
        if request.answered.done():
            return False
        if request.deadline is not None and self._clock() > request.deadline:
            request.answered.set_exception(self._refusal(late=True))
            return False
        return True

    def _refusal(self, *, late: bool) -> QueueFullError:
        self.workload.refused()
        wait = self.workload.wait_s
        return QueueFullError(min(_MAX_RETRY_S, max(1, math.ceil(wait))), wait, late=late)

    def _deliver(self, batch: Sequence[_Text], outputs: FloatArray, seconds: float, waits: tuple[float, ...]) -> None:
        for text, row in zip(batch, outputs, strict=True):
            request = text.request
            request.rows[text.position] = row
            request.missing -= 1
            if not request.missing and not request.answered.done():
                request.answered.set_result(np.stack([row for row in request.rows if row is not None]))
        lengths = [len(text.item.ids) for text in batch]
        self.workload.computed(sum(lengths), seconds)
        computed = sum(lengths) if self._max_padding is None else len(batch) * max(lengths)
        self.report(BatchReport(len(batch), sum(lengths), computed, seconds, waits))


def _waits(batch: Sequence[_Text], now: float) -> tuple[float, ...]:
    """How long the requests have waited of which nothing was computed before this batch."""
    found = []
    for text in batch:
        if not text.request.started:
            text.request.started = True
            found.append(now - text.request.submitted)
            if text.request.on_start:
                text.request.on_start(found[-1])
    return tuple(found)
