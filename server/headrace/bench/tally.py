"""What happened to each request of a step, and the numbers that come of it: pure."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

MOST_PROBLEMS = 20  # kinds told apart; what comes later is counted together


@dataclass(frozen=True, slots=True)
class Latencies:
    """Percentiles in milliseconds, each a latency that was really seen."""

    p50_ms: float
    p90_ms: float
    p99_ms: float


class Tally:
    """Counts what ends between two moments of the monotonic clock; clients stop asking after the second."""

    __slots__ = ("errors", "from_ns", "latencies_ns", "to_ns")

    def __init__(self, from_ns: int, to_ns: int) -> None:
        self.from_ns = from_ns
        self.to_ns = to_ns
        self.latencies_ns = array("q")  # of good answers
        self.errors: Counter[str] = Counter()

    def add(self, started_ns: int, ended_ns: int, problem: str | None) -> bool:
        """One request is over. Returns whether its client is to go on."""
        if self.from_ns <= ended_ns < self.to_ns:
            if problem is None:
                self.latencies_ns.append(ended_ns - started_ns)
            else:
                self.fail(problem)
        return ended_ns < self.to_ns

    def fail(self, problem: str, count: int = 1) -> None:
        """Requests without a good answer."""
        known = problem in self.errors or len(self.errors) < MOST_PROBLEMS
        self.errors[problem if known else "other problems"] += count

    @property
    def requests_per_s(self) -> float:
        """Good answers over the length of the window."""
        return len(self.latencies_ns) / (self.to_ns - self.from_ns) * 1e9

    def latencies(self) -> Latencies | None:
        """None without a good answer."""
        if not self.latencies_ns:
            return None
        ordered = sorted(self.latencies_ns)
        return Latencies(*(percentile(ordered, fraction) / 1e6 for fraction in (0.5, 0.9, 0.99)))


def percentile(ordered: Sequence[int], fraction: float) -> int:
    """The nearest rank in values that ascend: the least of them that ``fraction`` of all do not exceed."""
    return ordered[max(ceil(fraction * len(ordered)) - 1, 0)]
