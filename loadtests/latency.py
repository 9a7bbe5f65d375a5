"""Latencies of single requests, boiled down to percentiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """What ``count`` latencies look like, in milliseconds."""

    count: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float


def percentile(ordered: Sequence[int], fraction: float) -> int:
    """The nearest-rank percentile of values in ascending order: always one that was really measured.

    Raises:
        ValueError: there are no values, or ``fraction`` is not within 0..1.
    """
    if not ordered:
        raise ValueError("a percentile of no values was asked for; expected at least one")
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction is {fraction}, expected 0 to 1")
    return ordered[max(ceil(fraction * len(ordered)) - 1, 0)]


def summarize(latencies_ns: Sequence[int]) -> LatencySummary:
    """The summary of one or more latencies in nanoseconds, in any order."""
    ordered = sorted(latencies_ns)
    return LatencySummary(
        count=len(ordered),
        p50_ms=percentile(ordered, 0.50) / 1e6,
        p90_ms=percentile(ordered, 0.90) / 1e6,
        p99_ms=percentile(ordered, 0.99) / 1e6,
        max_ms=ordered[-1] / 1e6,
        mean_ms=sum(ordered) / len(ordered) / 1e6,
    )
