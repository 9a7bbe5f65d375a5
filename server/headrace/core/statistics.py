"""What happened to one model version: counters that the data plane adds to, metrics and statistics read.

How the numbers agree:

- every request ends as one ``success`` or one of ``failures``; a hit of the response cache is a success;
- ``success`` requests have waited, if only for no time at all, and ``computed`` of them, those that the cache did not
  answer, have run. The sums of queue and compute times are over just these;
- ``rows`` and ``executions`` are of batches that ran, whoever still waited for them: they are the sums of
  ``by_batch_size``;
- a request in parts is one request: each part is a batch member, and its times add up in the whole's.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from time import monotonic_ns, time
from typing import Literal

from headrace.core.window import Window

# Seconds. From a request that never left the caches to one that a person gives up on.
LATENCY_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
ROWS_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
FIRST_RESPONSE_BUCKETS_MS = (100.0, 500.0, 2000.0, 5000.0)  # Triton's
MAX_RESPONSE_INDEXES = 1024  # a request may have any number of responses; those past it count at the last index

# Why a request was refused at arrival, or given up before it was answered.
REFUSALS = ("queue_full", "too_late", "objective", "inflight_bytes", "expired", "other")

Outcome = Literal["success", "fail", "empty_response", "cancel"]


class Histogram:
    """Observations counted by bucket. Plain integers, because one is fed several times for each request."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation, in the unit of ``bounds``."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, int]]:
        """Prometheus's form: upper bound as text, and how many observations are at or under it."""
        running = 0
        rows: list[tuple[str, int]] = []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            rows.append((bound, running))
        return rows


@dataclass(slots=True)
class BatchSizeTotals:
    """Executions of one batch size: how many, and the nanoseconds they took."""

    executions: int = 0
    compute_input_ns: int = 0
    compute_infer_ns: int = 0
    compute_output_ns: int = 0


@dataclass(slots=True)
class Tally:
    """How often something happened, and the nanoseconds that it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """It happened once more."""
        self.count += 1
        self.ns += ns


@dataclass(slots=True)
class ResponseTotals:
    """Responses of a decoupled model that had one index within their requests."""

    compute_infer: Tally = field(default_factory=Tally)
    compute_output: Tally = field(default_factory=Tally)
    success: Tally = field(default_factory=Tally)
    fail: Tally = field(default_factory=Tally)
    empty_response: Tally = field(default_factory=Tally)
    cancel: Tally = field(default_factory=Tally)


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """A response cache that this process holds: what is in it, and how many entries had to make room so far."""

    bytes: int
    entries: int
    evictions: int


class Summaries:
    """The last minute of one model's durations, in nanoseconds: what quantiles are read from."""

    __slots__ = (
        "_clock",
        "cache_hit",
        "cache_miss",
        "compute_infer",
        "compute_input",
        "compute_output",
        "queue",
        "request",
    )

    def __init__(self, clock: Callable[[], int] = monotonic_ns) -> None:
        self._clock = clock
        self.request = Window()
        self.queue = Window()
        self.compute_input = Window()
        self.compute_infer = Window()
        self.compute_output = Window()
        self.cache_hit = Window()
        self.cache_miss = Window()

    def succeeded(self, duration_ns: int, queue_ns: int) -> None:
        """As ``Statistics.succeeded``."""
        now_ns = self._clock()
        self.request.observe(duration_ns, now_ns)
        self.queue.observe(queue_ns, now_ns)

    def executed(self, requests: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """As ``Statistics.executed``."""
        now_ns = self._clock()
        self.compute_input.observe(input_ns, now_ns, requests)
        self.compute_infer.observe(infer_ns, now_ns, requests)
        self.compute_output.observe(output_ns, now_ns, requests)

    def hit(self, lookup_ns: int) -> None:
        """As ``Statistics.cache_hit``."""
        self.cache_hit.observe(lookup_ns, self._clock())

    def missed(self, lookup_and_insert_ns: int) -> None:
        """As ``Statistics.cache_miss``."""
        self.cache_miss.observe(lookup_and_insert_ns, self._clock())

    def quantiles(self, window: Window, wanted: tuple[float, ...]) -> list[float]:
        """Nanoseconds at each quantile, as of now."""
        return window.quantiles(wanted, self._clock())


@dataclass(slots=True)
class Statistics:
    """Counters of one model version; they only grow. Durations in nanoseconds, summed over requests.

    ``with_summaries`` keeps quantiles of the last minute too, which costs some microseconds a request.
    """

    success: int = 0
    success_ns: int = 0
    failures: dict[str, int] = field(default_factory=dict)  # by Triton's reason: REJECTED CANCELED BACKEND OTHER
    failure_ns: int = 0
    refusals: dict[str, int] = field(default_factory=dict)  # by one of REFUSALS; each is a failure as well
    rows: int = 0
    executions: int = 0
    queue_ns: int = 0
    compute_input_ns: int = 0
    compute_infer_ns: int = 0
    compute_output_ns: int = 0
    cache_hits: int = 0
    cache_hit_ns: int = 0
    cache_misses: int = 0
    cache_miss_ns: int = 0
    worker_deaths: int = 0
    retries: int = 0
    load_seconds: float = 0.0
    last_inference_ms: int = 0
    by_batch_size: dict[int, BatchSizeTotals] = field(default_factory=dict)
    by_response: dict[int, ResponseTotals] = field(default_factory=dict)  # empty unless the model is decoupled
    request_latency_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS_S))
    queue_time_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS_S))
    compute_time_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS_S))
    batch_rows: Histogram = field(default_factory=lambda: Histogram(ROWS_BUCKETS))
    first_response_ms: Histogram = field(default_factory=lambda: Histogram(FIRST_RESPONSE_BUCKETS_MS))
    with_summaries: InitVar[bool] = False
    summaries: Summaries | None = field(init=False, default=None)

    def __post_init__(self, with_summaries: bool) -> None:
        if with_summaries:
            self.summaries = Summaries()

    @property
    def computed(self) -> int:
        """Requests that were answered by running the model."""
        return self.success - self.cache_hits

    def failed(self, reason: str, duration_ns: int) -> None:
        """One request was answered with an error."""
        self.failures[reason] = self.failures.get(reason, 0) + 1
        self.failure_ns += duration_ns

    def refused(self, reason: str, duration_ns: int = 0) -> None:
        """One request was refused, or given up after ``duration_ns``, for one of REFUSALS."""
        self.refusals[reason] = self.refusals.get(reason, 0) + 1
        self.failed("REJECTED", duration_ns)

    def succeeded(self, duration_ns: int, queue_ns: int) -> None:
        """One request was answered by the model; ``duration_ns`` counts from its arrival at the queue."""
        self.success += 1
        self.success_ns += duration_ns
        self.queue_ns += queue_ns
        self.request_latency_s.observe(duration_ns * 1e-9)
        self.queue_time_s.observe(queue_ns * 1e-9)
        if self.summaries is not None:
            self.summaries.succeeded(duration_ns, queue_ns)

    def executed(self, requests: int, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """One batch of ``rows`` ran. Its times count once for each of its requests, as Triton counts them.

        ``requests`` are those that it answers: one whose client has left is none of them, though its rows ran.
        """
        self.last_inference_ms = int(time() * 1000)
        self.executions += 1
        self.rows += rows
        self.compute_input_ns += input_ns * requests
        self.compute_infer_ns += infer_ns * requests
        self.compute_output_ns += output_ns * requests
        totals = self.by_batch_size.get(rows)
        if totals is None:
            totals = self.by_batch_size[rows] = BatchSizeTotals()
        totals.executions += 1
        totals.compute_input_ns += input_ns
        totals.compute_infer_ns += infer_ns
        totals.compute_output_ns += output_ns
        self.compute_time_s.observe((input_ns + infer_ns + output_ns) * 1e-9)
        self.batch_rows.observe(rows)
        if self.summaries is not None and requests:
            self.summaries.executed(requests, input_ns, infer_ns, output_ns)

    def cache_hit(self, lookup_ns: int) -> None:
        """One request was answered out of the response cache: a success that neither waited nor ran."""
        self.cache_hits += 1
        self.cache_hit_ns += lookup_ns
        if self.summaries is not None:
            self.summaries.hit(lookup_ns)
        self.succeeded(lookup_ns, 0)

    def cache_miss(self, lookup_and_insert_ns: int) -> None:
        """One request was not in the response cache; how it ended is counted apart."""
        self.cache_misses += 1
        self.cache_miss_ns += lookup_and_insert_ns
        if self.summaries is not None:
            self.summaries.missed(lookup_and_insert_ns)

    def first_responded(self, duration_ns: int) -> None:
        """A decoupled model gave the first response to a request; ``duration_ns`` counts from its arrival."""
        self.first_response_ms.observe(duration_ns * 1e-6)

    def responded(self, index: int, infer_ns: int, output_ns: int, outcome: Outcome) -> None:
        """A decoupled model gave response number ``index`` to a request, from 0 for each request.

        ``infer_ns`` counts from the response before it, or from when the request began to run; ``output_ns`` is what
        taking the outputs took. ``empty_response`` is an end without outputs, ``cancel`` one because the client left:
        the former has no ``output_ns``, and of the latter only the sum is kept, as its own duration.
        """
        index = min(index, MAX_RESPONSE_INDEXES - 1)
        totals = self.by_response.get(index)
        if totals is None:
            totals = self.by_response[index] = ResponseTotals()
        if outcome == "cancel":
            totals.cancel.add(infer_ns + output_ns)
            return
        totals.compute_infer.add(infer_ns)
        if outcome == "empty_response":
            totals.empty_response.add(infer_ns)
            return
        totals.compute_output.add(output_ns)
        (totals.success if outcome == "success" else totals.fail).add(infer_ns + output_ns)
