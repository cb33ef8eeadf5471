"""Samples of what is asked and answered, masked, in the store: to look at, and to label.

    <store>/samples/<model>/<date>/<replica>-<time>-<n>.jsonl

A request is chosen by chance alone, and put into a bounded buffer; a thread masks at once what is there, and writes it
now and then, each file whole or not at all. Where the store is away the buffer fills, and what finds no room is counted
and forgotten.
"""

import atexit
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import Field, model_validator
from upath import UPath

from cluster.store import is_local, write_whole
from models.engine import Answer
from models.redaction import RedactionSettings
from models.settings import InputError, Settings
from models.spec import ClassifierSpec
from serve.logs import logger
from serve.sample_rows import Sample, SampleRows

FOLDER = "samples"
"""In the store."""

FILE_ROWS = 1000
"""Rows of a file, about."""
FLUSH_S = 60.0
"""Seconds after which they are written, however few they are."""

_MOST_ROWS = 10 * FILE_ROWS
_MOST_CHARACTERS = 2**24
_CLOSE_S = 10.0
"""Seconds that the end of a replica waits for the store."""

_LABELS = ("model", "version", "replica")
_log = logger("samples")


class SampleSettings(Settings):
    """Which requests are kept, masked, in the store."""

    share: float = Field(0.01, gt=0, le=1, description="The share of the requests; each is chosen by chance.")
    per_minute: int = Field(60, ge=1, description="Requests of a minute that each replica keeps at most.")
    redact: RedactionSettings = Field(
        RedactionSettings(), description="What is masked in them besides; it cannot be turned off."
    )

    @model_validator(mode="after")
    def _masks_something(self) -> "SampleSettings":
        if not self.redact.kinds:
            raise ValueError("redact.kinds is empty, but samples are never kept unmasked; leave it out to mask all")
        return self


class Sampler(Collector):
    """One replica's samples; as a collector of Prometheus' client it tells how many there were.

    Of the rows (texts) of all requests that were chosen, each is written or dropped in the end.

    Args:
        settings: of sampling.
        store: its root.
        spec: the classifier's; texts are cleaned as it cleans them.
        own: the values of the labels model, version and replica.
        redact: what is masked of every text to classify.
        draw: from [0, 1).
        clock: seconds.
    """

    def __init__(
        self,
        settings: SampleSettings,
        store: UPath,
        spec: ClassifierSpec,
        own: tuple[str, str, str],
        redact: RedactionSettings | None = None,
        *,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._folder = store / FOLDER / own[0]
        redactors = [each.redactor for each in (redact, settings.redact) if each]
        self._rows_of = SampleRows(spec.text, redactors, own[0], own[1])
        self._own = own
        self._draw = draw
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: deque[Sample] = deque()
        self._rows = self._characters = 0
        self._written = self._dropped = 0
        self._minute, self._of_minute = 0.0, 0
        self._closed = self._given_up = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        # The thread's own, or whoever closes without one.
        self._lines: list[tuple[str, int]] = []
        self._unwritten: tuple[UPath, int] | None = None
        self._files = 0
        self._fails = False

    def offer(
        self, request_id: str, texts: Sequence[str], pairs: Sequence[str] | None, answers: Sequence[Answer]
    ) -> None:
        """Keeps a request and its answers, if chance will have it and there is room; takes no time to speak of."""
        if self._draw() >= self._settings.share:
            return
        characters = sum(map(len, texts)) + sum(map(len, pairs or ()))
        with self._lock:
            if not self._takes(len(texts), characters):
                self._dropped += len(texts)
                return
            self._rows += len(texts)
            self._characters += characters
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._waiting.append(Sample(request_id, now, texts, pairs, answers, characters))
        self._wake.set()

    def _takes(self, rows: int, characters: int) -> bool:
        now = self._clock()
        if now - self._minute >= 60:
            self._minute, self._of_minute = now, 0
        if (
            self._closed
            or self._of_minute >= self._settings.per_minute
            or self._rows + rows > _MOST_ROWS
            or self._characters + characters > _MOST_CHARACTERS
        ):
            return False
        self._of_minute += 1
        return True

    def start(self) -> None:
        """Masks and writes from now on, in a thread that ends when this is closed, or the process ends."""
        self._thread = threading.Thread(target=self._run, name="samples", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Takes no more, and writes what there is; what the store does not take in some seconds is dropped."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        self._wake.set()
        if self._thread is None:
            self.flush()
        else:
            self._thread.join(_CLOSE_S)
        with self._lock:
            lost, self._given_up = self._rows, True
            self._rows = self._characters = 0
            self._dropped += lost
        if lost:
            _log.warning("%s rows of samples could not be written before the end.", lost)

    def flush(self) -> None:
        """Masks and writes all that waits; what cannot be written is tried again at the next call."""
        self._mask()
        while self._lines and self._write():
            pass

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        with self._lock:
            counts = {"shoal_samples": self._written, "shoal_samples_dropped": self._dropped}
        texts = {
            "shoal_samples": "Texts that were written to the store as samples.",
            "shoal_samples_dropped": "Texts of chosen requests that were not kept: too many, or the store is away.",
        }
        for name, count in counts.items():
            family = CounterMetricFamily(name, texts[name], labels=_LABELS)
            family.add_metric(self._own, count)
            yield family

    def _run(self) -> None:
        due = self._clock() + FLUSH_S
        while not self._closed:
            self._wake.wait(max(0.0, due - self._clock()))
            self._wake.clear()
            self._mask()
            if self._clock() >= due or (len(self._lines) >= FILE_ROWS and not self._fails):
                self.flush()
                due = self._clock() + FLUSH_S
        self.flush()

    def _mask(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                sample = self._waiting.popleft()
            try:
                lines = self._rows_of.lines(sample)
            except Exception:  # Whatever it is, this request goes, and the next is looked at.
                said = "\n".join((*sample.texts, *(sample.pairs or ())))
                _log.warning("A request could not be masked, and is no sample.", exc_info=True, extra={"said": said})
                self._release(len(sample.texts), sample.characters, written=False)
                continue
            each = sample.characters // len(lines)
            self._lines += [(line, each) for line in lines[:-1]]
            self._lines.append((lines[-1], sample.characters - each * (len(lines) - 1)))

    def _write(self) -> bool:
        """Writes one file; whether it could."""
        if self._unwritten is None:
            self._files += 1
            now = datetime.now(UTC)
            name = f"{self._own[2]}-{now:%Y%m%dT%H%M%SZ}-{self._files}.jsonl"
            self._unwritten = self._folder / f"{now:%Y-%m-%d}" / name, min(len(self._lines), FILE_ROWS)
        # A try that failed may have written it all the same, so the next writes the same rows to the same place.
        path, count = self._unwritten
        rows = self._lines[:count]
        try:
            if is_local(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(f"{line}\n" for line, _ in rows))
        except Exception as error:  # whatever a store's library may raise
            if not self._fails:
                _log.warning("Samples cannot be written to %s: %s; it is tried again.", path.parent, error)
            self._fails = True
            return False
        self._fails, self._unwritten = False, None
        del self._lines[:count]
        self._release(count, sum(size for _, size in rows), written=True)
        return True

    def _release(self, rows: int, characters: int, *, written: bool) -> None:
        with self._lock:
            if self._given_up:  # They were counted as dropped when this was closed.
                return
            self._rows -= rows
            self._characters -= characters
            if written:
                self._written += rows
            else:
                self._dropped += rows


def make_sampler(
    settings: SampleSettings | None,
    store: UPath | None,
    spec: ClassifierSpec,
    own: tuple[str, str, str],
    redact: RedactionSettings | None = None,
) -> Sampler | None:
    """The sampler that the settings ask for, at work; None where nothing is sampled.

    Raises:
        InputError: there is no store.
    """
    if settings is None:
        return None
    if store is None:
        raise InputError("serve.sample keeps samples in the store, but this endpoint was given none.")
    sampler = Sampler(settings, store, spec, own, redact)
    sampler.start()
    return sampler
