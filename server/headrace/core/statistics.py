"""What happened to one model version: counters that the data plane adds to and the metrics read."""

from bisect import bisect_left
from dataclasses import dataclass, field

# Seconds. From a request that never left the caches to one that a person gives up on.
LATENCY_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
ROWS_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


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
class Statistics:
    """Counters of one model version; they only grow. Durations in nanoseconds, summed over requests."""

    success: int = 0
    success_ns: int = 0
    failures: dict[str, int] = field(default_factory=dict)  # by Triton's reason: REJECTED CANCELED BACKEND OTHER
    failure_ns: int = 0
    rows: int = 0
    executions: int = 0
    queue_ns: int = 0
    compute_input_ns: int = 0
    compute_infer_ns: int = 0
    compute_output_ns: int = 0
    worker_deaths: int = 0
    retries: int = 0
    load_seconds: float = 0.0
    last_inference_ms: int = 0
    by_batch_size: dict[int, BatchSizeTotals] = field(default_factory=dict)
    request_latency_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS_S))
    queue_time_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS_S))
    compute_time_s: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS_S))
    batch_rows: Histogram = field(default_factory=lambda: Histogram(ROWS_BUCKETS))

    def failed(self, reason: str, duration_ns: int) -> None:
        """One request was answered with an error."""
        self.failures[reason] = self.failures.get(reason, 0) + 1
        self.failure_ns += duration_ns

    def succeeded(self, duration_ns: int, queue_ns: int) -> None:
        """One request was answered; ``duration_ns`` counts from its arrival at the queue."""
        self.success += 1
        self.success_ns += duration_ns
        self.queue_ns += queue_ns
        self.request_latency_s.observe(duration_ns * 1e-9)
        self.queue_time_s.observe(queue_ns * 1e-9)

    def executed(self, requests: int, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """One batch ran: its times count once for each of its requests, as Triton counts them."""
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
