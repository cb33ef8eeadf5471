"""What `/metrics` tells: counters in Prometheus' text form, of this replica and of those beside it.

HAProxy gives each scrape to any one replica. So every replica publishes its own page now and then where the
others find it, and whichever is asked answers with all of them; the label `replica` keeps the series apart, and
`sum by (model, version)` adds them up.
"""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.registry import Collector

from serve.batching import BatchReport

_LATENCIES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_EXPLANATIONS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_WAITS = (0.001, *_LATENCIES)
_LABELS = ("model", "version", "replica")


class ServeMetrics:
    """The counters of one replica; every series names the model, its version and the replica.

    Args:
        model: the model's name.
        version: its artifact's fingerprint.
        replica: which of the replicas this is.
        queued: how many requests are in progress.
        queued_tokens: how many tokens their texts have that have been read.
        min_replicas: how many replicas there are to be at least.
        build: what else is fixed for a replica's life (engine, precision, ...), as labels of `shoal_build_info`.
    """

    def __init__(
        self,
        model: str,
        version: str,
        replica: str,
        queued: Callable[[], int],
        *,
        queued_tokens: Callable[[], int],
        min_replicas: int,
        build: Mapping[str, str],
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody reads
        self._registry = registry = CollectorRegistry()
        self._own = own = (model, version, replica)
        self._requests = Counter("shoal_requests", "Requests by status.", (*_LABELS, "status"), registry=registry)
        self._latency = Histogram(
            "shoal_request_seconds", "Seconds to an answer.", _LABELS, buckets=_LATENCIES, registry=registry
        ).labels(*own)
        self._texts = Counter("shoal_texts", "Texts classified.", _LABELS, registry=registry).labels(*own)
        self._truncated = Counter(
            "shoal_truncated_texts", "Texts longer than the model reads.", _LABELS, registry=registry
        ).labels(*own)
        self._tokens = Counter("shoal_tokens", "Tokens without padding.", _LABELS, registry=registry).labels(*own)
        self._padding = Counter("shoal_padding_tokens", "Padding computed besides.", _LABELS, registry=registry).labels(
            *own
        )
        self._batch_texts = Histogram(
            "shoal_batch_texts", "Texts of a batch.", _LABELS, buckets=_SIZES, registry=registry
        ).labels(*own)
        self._batch_seconds = Histogram(
            "shoal_batch_seconds", "Seconds to compute a batch.", _LABELS, buckets=_LATENCIES, registry=registry
        ).labels(*own)
        self._explanations = Histogram(
            "shoal_explanation_seconds", "Seconds to an explanation.", _LABELS, buckets=_EXPLANATIONS, registry=registry
        ).labels(*own)
        self._batch_tokens = Histogram(
            "shoal_batch_tokens", "Tokens of a batch, padding included.", _LABELS, buckets=_TOKENS, registry=registry
        ).labels(*own)
        self._waits = Histogram(
            "shoal_queue_wait_seconds",
            "Seconds from a request's texts being read to the start of computing the first.",
            _LABELS,
            buckets=_WAITS,
            registry=registry,
        ).labels(*own)
        self._gauge("shoal_queued_requests", "Requests waiting or computed now.").set_function(queued)
        self._gauge("shoal_queue_tokens", "Tokens waiting or computed now.").set_function(queued_tokens)
        self._gauge("shoal_min_replicas", "Replicas that there are to be at least.").set(min_replicas)
        info = Gauge("shoal_build_info", "What answers; always 1.", (*_LABELS, *build), registry=registry)
        info.labels(*own, *build.values()).set(1)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, _LABELS, registry=self._registry).labels(*self._own)

    def register(self, collector: Collector) -> None:
        """Puts another's metrics on the page; it sets the labels model, version and replica itself."""
        self._registry.register(collector)

    def request(self, status: int, seconds: float, *, explanation: bool = False) -> None:
        """Counts an answered request. Explanations take long, so their seconds are kept apart."""
        self._requests.labels(*self._own, str(status)).inc()
        if status == 200:
            (self._explanations if explanation else self._latency).observe(seconds)

    def shed(self, requests: int) -> None:
        """Counts requests that HAProxy refused in this replica's stead."""
        self._requests.labels(*self._own, "429").inc(requests)

    def classified(self, texts: int, truncated: int) -> None:
        """Counts the texts of a request."""
        self._texts.inc(texts)
        self._truncated.inc(truncated)

    def batch(self, report: BatchReport) -> None:
        """Counts a batch."""
        self._tokens.inc(report.tokens)
        self._padding.inc(report.padded_tokens - report.tokens)
        self._batch_texts.observe(report.texts)
        self._batch_seconds.observe(report.seconds)
        self._batch_tokens.observe(report.padded_tokens)
        for seconds in report.waits:
            self._waits.observe(seconds)

    def page(self) -> str:
        """This replica's metrics as Prometheus reads them."""
        return generate_latest(self._registry).decode()


def merged(pages: Iterable[str]) -> str:
    """One page of several: each family's HELP and TYPE once, then the samples of all."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for page in pages:
        name = ""
        for line in page.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
            head, samples = families.setdefault(name, ([], []))
            if not line.startswith("#"):
                samples.append(line)
            elif line not in head:
                head.append(line)
    return "".join(f"{line}\n" for head, samples in families.values() for line in (*head, *samples))
