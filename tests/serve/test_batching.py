"""The batcher: every request is answered once, in order, within the budget, and none starves."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.engine import Encoded, FloatArray
from serve.batching import Batcher, BatchReport, QueueFullError


def text(number: int, length: int) -> Encoded:
    """A text whose number is its first token, so that a fake engine can echo it."""
    return Encoded([number, *([0] * (length - 1))], None, False)


@dataclass
class EchoEngine:
    """Answers each text with its number; records the batches; waits for `gate` where it has one.

    Nobody may compute more than `lanes` batches at once.
    """

    batches: list[list[int]] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    gate: threading.Semaphore | None = None
    lanes: int = 1
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, batch: Sequence[Encoded]) -> FloatArray:
        with self.lock:
            self.running += 1
            assert self.running <= self.lanes, "too many batches at once"
            self.most = max(self.most, self.running)
            self.batches.append([item.ids[0] for item in batch])
            self.lengths.append([len(item.ids) for item in batch])
        if self.gate:
            assert self.gate.acquire(timeout=10)
        with self.lock:
            self.running -= 1
        return np.array([[item.ids[0]] for item in batch], dtype=np.float32)


@dataclass
class Clock:
    """Seconds that pass when told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


async def ask(batcher: Batcher, items: Sequence[Encoded]) -> FloatArray:
    with batcher.place():
        return await batcher.submit(items)


REQUESTS = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=8), min_size=1, max_size=20)


PADDING = st.sampled_from([None, 0.0, 0.1])
"""None: texts are laid end to end, and nothing is padded whatever stands together."""


@given(
    lengths=REQUESTS, budget=st.integers(1, 1000), padding=PADDING, lanes=st.sampled_from([1, 1, 2, 3]), data=st.data()
)
@settings(max_examples=120, deadline=None)
def test_every_request_is_answered_once_within_the_budget(
    lengths: list[list[int]], budget: int, padding: float | None, lanes: int, data: st.DataObject
) -> None:
    pauses = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    engine, reports = EchoEngine(lanes=lanes), list[BatchReport]()

    async def run() -> None:
        batcher = Batcher(engine, budget, max_queued=100, max_padding=padding, report=reports.append, lanes=lanes)
        number, tasks = 0, []
        for request, pause in zip(lengths, pauses, strict=True):
            items = [text(number + index, length) for index, length in enumerate(request)]
            tasks.append((list(range(number, number + len(items))), asyncio.create_task(ask(batcher, items))))
            number += len(items)
            if pause:
                await asyncio.sleep(0)
        for numbers, task in tasks:
            assert (await task)[:, 0].tolist() == numbers
        assert batcher.queued == 0
        batcher.close()

    asyncio.run(run())
    total = sum(map(len, lengths))
    assert sorted(number for batch in engine.batches for number in batch) == list(range(total))
    computed = [sum(batch) if padding is None else len(batch) * max(batch) for batch in engine.lengths]
    assert all(len(batch) == 1 or tokens <= budget for batch, tokens in zip(engine.lengths, computed, strict=True))
    assert sorted(report.padded_tokens for report in reports) == sorted(computed)
    assert sum(report.texts for report in reports) == total
    assert sum(report.tokens for report in reports) == sum(map(sum, lengths))
    padded = sum(report.padded_tokens - report.tokens for report in reports)
    assert padded >= 0 if padding else padded == 0
    waits = [seconds for report in reports for seconds in report.waits]
    assert len(waits) == len(lengths)  # A request waits once, whatever batches its texts are in.
    assert all(0 <= seconds < 60 for seconds in waits)


@pytest.mark.parametrize("padding", [None, 0.1])
def test_the_longest_waiting_is_always_next(padding: float | None) -> None:
    """A long text is not passed over while short ones keep coming."""
    gate = threading.Semaphore(0)
    engine = EchoEngine(gate=gate)

    async def run() -> None:
        batcher = Batcher(engine, 64, max_queued=1000, max_padding=padding)
        tasks = [asyncio.create_task(ask(batcher, [text(0, 8)]))]
        await asyncio.sleep(0.02)  # the first batch is being computed
        tasks.append(asyncio.create_task(ask(batcher, [text(1, 300)])))
        tasks += [asyncio.create_task(ask(batcher, [text(number, 8)])) for number in range(2, 50)]
        await asyncio.sleep(0)
        for _ in range(20):
            gate.release()
        await asyncio.gather(*tasks)
        batcher.close()

    asyncio.run(run())
    assert engine.batches[:2] == [[0], [1]]
    assert len(engine.batches) == 2 + 6  # 48 texts of 8 tokens, 8 to a batch of 64


@given(first=st.lists(st.integers(1, 200), min_size=1, max_size=40), budget=st.integers(1, 400), padding=PADDING)
@settings(max_examples=60, deadline=None)
def test_a_text_with_k_before_it_waits_for_at_most_k_batches(
    first: list[int], budget: int, padding: float | None
) -> None:
    engine = EchoEngine()

    async def run() -> None:
        batcher = Batcher(engine, budget, max_queued=1000, max_padding=padding)
        await asyncio.gather(*(ask(batcher, [text(number, length)]) for number, length in enumerate(first)))
        batcher.close()

    asyncio.run(run())
    turn = {number: index for index, batch in enumerate(engine.batches) for number in batch}
    assert all(turn[number] <= number for number in turn)


@pytest.mark.parametrize("requests", [[2], [1, 1], [8]])
def test_texts_that_come_together_are_computed_at_once_in_lanes(requests: list[int]) -> None:
    engine, clock = EchoEngine(gate=threading.Semaphore(0), lanes=2), Clock()

    async def run() -> None:
        batcher = Batcher(engine, 64, max_queued=10, max_padding=None, clock=clock, lanes=2)
        tasks = [asyncio.create_task(ask(batcher, [text(0, 4)] * texts)) for texts in requests]
        while engine.running < 2:
            await asyncio.sleep(0.001)
        later = [asyncio.create_task(ask(batcher, [text(9, 4)])) for _ in range(3)]
        await asyncio.sleep(0.02)
        each = [0] * (sum(requests) // 2)
        assert engine.batches == [each, each]
        for one in later:
            one.cancel()
        clock.now = 2.0
        assert engine.gate
        engine.gate.release(2)
        await asyncio.gather(*tasks)
        assert batcher.workload.tokens_per_second == pytest.approx(2 * len(each) * 4 / 2)  # of both lanes
        assert batcher.workload.seconds_for(8, texts=1) == 2 * batcher.workload.seconds_for(8, texts=2)
        clock.now = 4.0
        assert batcher.load().busy == 0.5
        engine.gate.release(3)
        await asyncio.gather(*(ask(batcher, [text(8, 4)]) for _ in range(3)))
        batcher.close()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert engine.most == 2
    assert [number for batch in engine.batches[2:] for number in batch] == [8, 8, 8]


def test_who_comes_to_a_free_lane_does_not_wait() -> None:
    engine, clock = EchoEngine(gate=threading.Semaphore(0), lanes=2), Clock()

    async def run() -> None:
        batcher = Batcher(engine, 10_000, max_queued=10, max_padding=None, clock=clock, lanes=2)
        first = asyncio.create_task(ask(batcher, [text(0, 100)]))
        while not engine.running:
            await asyncio.sleep(0.001)
        clock.now = 1.0
        assert engine.gate
        engine.gate.release(1)
        await first
        long = asyncio.create_task(ask(batcher, [text(1, 4000)]))
        await asyncio.sleep(0.02)
        with batcher.place(timeout_s=0.5):
            short = asyncio.create_task(batcher.submit([text(2, 10)], deadline=1.5))
            await asyncio.sleep(0.02)
            with pytest.raises(QueueFullError), batcher.place(timeout_s=0.5):
                pass
            engine.gate.release(2)
            await asyncio.gather(long, short)
        batcher.close()

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("fault", ["compute", "rows", "report"])
def test_a_lane_that_failed_goes_on(fault: str) -> None:
    faults = [True, True, True]

    def compute(batch: Sequence[Encoded]) -> FloatArray:
        if faults and fault == "compute":
            faults.pop()
            raise ValueError("broken")
        rows = np.array([[item.ids[0]] for item in batch], dtype=np.float32)
        return rows[:-1] if faults and fault == "rows" and faults.pop() else rows

    def report(_: BatchReport) -> None:
        if faults and fault == "report":
            faults.pop()
            raise ValueError("broken")

    async def run() -> None:
        batcher = Batcher(compute, 8, max_queued=10, max_padding=None, report=report, lanes=2)
        while faults:
            results = await asyncio.gather(*(ask(batcher, [text(0, 8)]) for _ in range(2)), return_exceptions=True)
            assert fault == "report" or any(isinstance(each, ValueError) for each in results)
        for number in range(5):
            assert (await ask(batcher, [text(number, 8), text(number, 8)]))[:, 0].tolist() == [number, number]
        assert (batcher.queued, batcher.workload.queued_tokens) == (0, 0)
        batcher.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_clients_that_gave_up_are_skipped() -> None:
    gate = threading.Semaphore(0)
    engine = EchoEngine(gate=gate)

    async def run() -> None:
        batcher = Batcher(engine, 8, max_queued=10)
        tasks = [asyncio.create_task(ask(batcher, [text(number, 8)])) for number in range(5)]
        await asyncio.sleep(0.02)
        tasks[2].cancel()  # waits
        tasks[0].cancel()  # is being computed
        await asyncio.sleep(0)
        assert batcher.queued == 3
        for _ in range(5):
            gate.release()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, False, True, False, False]
        assert batcher.queued == 0
        batcher.close()

    asyncio.run(run())
    assert engine.batches == [[0], [1], [3], [4]]


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    gate = threading.Semaphore(0)
    engine = EchoEngine(gate=gate)

    async def run() -> None:
        batcher = Batcher(engine, 8, max_queued=3)
        tasks = [asyncio.create_task(ask(batcher, [text(number, 8)])) for number in range(3)]
        await asyncio.sleep(0.02)
        assert batcher.workload.queued_tokens == 24
        with pytest.raises(QueueFullError) as full:
            await ask(batcher, [text(9, 8)])
        assert 1 <= full.value.retry_after_s <= 60
        for _ in range(4):
            gate.release()
        await asyncio.gather(*tasks)
        assert batcher.workload.queued_tokens == 0
        assert (await ask(batcher, [text(9, 8)]))[0, 0] == 9
        batcher.close()

    asyncio.run(run())


def test_a_failing_batch_fails_its_requests_only() -> None:
    def compute(batch: Sequence[Encoded]) -> FloatArray:
        if any(item.ids[0] == 1 for item in batch):
            raise ValueError("broken")
        return np.array([[item.ids[0]] for item in batch], dtype=np.float32)

    async def run() -> None:
        batcher = Batcher(compute, 8, max_queued=10)
        tasks = [ask(batcher, [text(0, 8)]), ask(batcher, [text(1, 8), text(2, 8)]), ask(batcher, [text(3, 8)])]
        good, bad, late = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(good, np.ndarray)
        assert isinstance(bad, ValueError)
        assert isinstance(late, np.ndarray)
        assert batcher.queued == 0
        batcher.close()

    asyncio.run(run())


@given(lengths=REQUESTS, gone=st.sets(st.integers(0, 19)), turn=st.integers(1, 2000))
@settings(max_examples=40, deadline=None)
def test_texts_that_are_not_padded_come_in_their_order_as_many_as_a_turn_holds(
    lengths: list[list[int]], gone: set[int], turn: int
) -> None:
    engine, reports = EchoEngine(gate=threading.Semaphore(0)), list[BatchReport]()

    async def run() -> list[list[int]]:
        batcher = Batcher(engine, 1000, max_queued=100, max_padding=None, report=reports.append, turn_tokens=turn)
        first = asyncio.create_task(ask(batcher, [text(10_000, 1)]))
        await asyncio.sleep(0)
        tasks, number = [], 0
        for each in lengths:
            items = [text(number + place, length) for place, length in enumerate(each)]
            number += len(each)
            tasks.append(asyncio.create_task(ask(batcher, items)))
        await asyncio.sleep(0)
        for place in gone & set(range(len(tasks))):
            tasks[place].cancel()
        await asyncio.sleep(0)
        assert engine.gate
        engine.gate.release(number + 2)
        answers = await asyncio.gather(first, *tasks, return_exceptions=True)
        batcher.close()
        return [list(each[:, 0]) for each in answers[1:] if not isinstance(each, BaseException)]

    answers = asyncio.run(run())
    starts = np.cumsum([0, *(len(each) for each in lengths)])
    wanted = [
        list(range(start, start + len(each)))
        for place, (start, each) in enumerate(zip(starts, lengths, strict=False))
        if place not in gone
    ]
    assert answers == wanted
    computed = [number for batch in engine.batches for number in batch if number != 10_000]
    assert computed == [number for each in wanted for number in each]
    assert all(report.padded_tokens == report.tokens for report in reports)
    most = min(turn, 1000)
    assert all(sum(each) <= most or len(each) == 1 for each in engine.lengths)
    after = engine.lengths[2:]
    assert all(sum(each) + later[0] > most for each, later in zip(engine.lengths[1:-1], after, strict=True))


def test_who_would_wait_too_long_is_told_at_once_and_when_to_come_again() -> None:
    clock = Clock()

    def compute(batch: Sequence[Encoded]) -> FloatArray:
        clock.now += sum(len(item.ids) for item in batch) / 100  # 100 tokens a second
        return np.zeros((len(batch), 1), dtype=np.float32)

    async def run() -> None:
        batcher = Batcher(compute, 100, max_queued=100, max_padding=None, max_wait_s=4, clock=clock)
        await ask(batcher, [text(0, 100)])
        assert batcher.load().busy == 1
        waiting = [asyncio.create_task(ask(batcher, [text(number, 100)])) for number in range(3)]
        await asyncio.sleep(0)
        assert batcher.workload.queued_tokens == 300
        assert batcher.workload.wait_s == pytest.approx(3)
        with pytest.raises(QueueFullError) as refused, batcher.place(timeout_s=2.5):
            pass
        assert (refused.value.late, refused.value.retry_after_s) == (True, 3)
        with batcher.place(timeout_s=3.5):
            with pytest.raises(QueueFullError, match="try again in 3 s"):
                await batcher.submit([text(9, 100)], deadline=clock.now + 3.5)
            with pytest.raises(QueueFullError):
                await batcher.submit([text(9, 300)], deadline=clock.now + 5.5)
        waiting += [asyncio.create_task(ask(batcher, [text(9, 200)]))]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as refused, batcher.place():
            pass
        assert (refused.value.late, refused.value.retry_after_s) == (False, 5)
        await asyncio.gather(*waiting)
        load = batcher.load()
        assert (load.queued_tokens, load.tokens_per_second) == (0, pytest.approx(100))
        assert load.refused_per_second > 0
        batcher.close()

    asyncio.run(run())


def test_what_has_not_begun_at_its_deadline_is_not_computed() -> None:
    clock, engine = Clock(), EchoEngine(gate=threading.Semaphore(0))

    async def run() -> None:
        batcher = Batcher(engine, 8, max_queued=100, clock=clock)
        first = asyncio.create_task(ask(batcher, [text(0, 8)]))
        await asyncio.sleep(0)
        late = asyncio.create_task(batcher.submit([text(1, 8)], deadline=1.0))
        in_time = asyncio.create_task(batcher.submit([text(2, 8)], deadline=9.0))
        await asyncio.sleep(0)
        clock.now = 2.0
        assert engine.gate
        engine.gate.release(3)
        await asyncio.gather(first, in_time)
        with pytest.raises(QueueFullError) as refused:
            await late
        assert refused.value.late
        batcher.close()

    asyncio.run(run())
    assert engine.batches == [[0], [2]]
