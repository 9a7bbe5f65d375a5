"""A model's latency objective: what can still be promised is accepted, what would come too late is refused. Pure."""

from dataclasses import dataclass
from math import sqrt

from headrace.batching.adaptive import AdaptivePolicy
from headrace.batching.arrivals import ArrivalRate
from headrace.batching.budget import Budget
from headrace.batching.curve import LatencyCurves
from headrace.batching.forecast import Forecast, Waiting
from headrace.batching.policy import BatchLimits, FixedPolicy
from headrace.core.validation import BatchKey

CAUTION = 2 / 3  # of what a batch in a hundred exceeds the mean by: not every row of it is the last that is in time
LEARNING = 16  # batches of a curve before late answers are held against its predictions


@dataclass(frozen=True, slots=True)
class TooLate:
    """Why a request is refused. ``predicted_ns`` counts from its arrival; None while no instance is up."""

    predicted_ns: int | None
    rows_ahead: int

    def explain(self, objective_ns: int) -> str:
        """The same, for whoever sent the request."""
        objective = f"the objective of {objective_ns * 1e-6:g} ms (batching.p99_objective_ms)"
        if self.predicted_ns is None:
            return f"no instance is up now, so {objective} cannot be met"
        return (
            f"the request would be answered {self.predicted_ns * 1e-6:.1f} ms after it came, too late for {objective}; "
            f"{self.rows_ahead} rows wait before it"
        )


class Objective:
    """``objective_ns`` is what 99 in 100 accepted requests are to take at most, from arrival to answer.

    With ``adaptive`` the batches are its own business; without, they are what the limits say, and only admission is.
    """

    def __init__(self, objective_ns: int, curves: LatencyCurves, *, adaptive: bool) -> None:
        self.adaptive = adaptive
        self.budget = Budget(objective_ns)
        self.forecast = Forecast(curves)
        self.arrivals = ArrivalRate(objective_ns)
        self.refused = 0
        self._curves = curves
        self.policy: AdaptivePolicy | FixedPolicy = FixedPolicy(BatchLimits())

    def set_limits(self, limits: BatchLimits) -> AdaptivePolicy | FixedPolicy:
        """What batches may be; the policy by which the backlog is to close them."""
        if self.adaptive:
            self.policy = AdaptivePolicy(limits, self.budget, self._curves, self.forecast, self.arrivals)
        else:
            self.policy = FixedPolicy(limits)
        return self.policy

    def admit(self, ahead: Waiting, key: BatchKey, rows: int, now_ns: int) -> TooLate | None:
        """Whether a request of so many rows has to be refused, with these rows ahead of it; None where it is accepted.

        One that finds an instance idle and nobody waiting is accepted whatever is predicted: nobody could serve it
        sooner, and nothing would ever be learned again otherwise.
        """
        self.arrivals.arrived(rows, now_ns)
        waiting = list(ahead)
        if not self.forecast.instances:
            self.refused += 1
            return TooLate(None, _rows(waiting))
        if not waiting and self.forecast.free_ns(now_ns)[0] <= now_ns:
            return None
        predicted_ns = self._latency_ns(waiting, key, rows, now_ns)
        if predicted_ns is None or predicted_ns <= self.budget.ns:
            return None
        self.refused += 1
        return TooLate(int(predicted_ns), _rows(waiting))

    def answered(self, key: BatchKey, timely: int, late: int) -> None:
        """Requests of a batch were answered, so many within the objective and so many after it."""
        curve = self._curves.of(key)
        self.budget.answered(timely, late, learn=curve is not None and curve.batches > LEARNING)

    def spare_ns(self, key: BatchKey, rows: int, oldest_ns: int, now_ns: int) -> int:
        """How much longer so many rows, of which the oldest came at ``oldest_ns``, may wait before they run."""
        curve = self._curves.of(key)
        if curve is None:
            return 0
        return max(0, int(oldest_ns + self.budget.ns - curve.high_ns(min(rows, self.policy.size(curve))) - now_ns))

    def _latency_ns(self, waiting: list[tuple[BatchKey, int]], key: BatchKey, rows: int, now_ns: int) -> float | None:
        """How long after now a request would be answered; None where nothing is known."""
        curve = self._curves.of(key)
        if curve is None:
            return None
        size = self.policy.size(curve)
        own, others_ns = 0, 0.0
        for each in waiting:
            if each[0] == key:
                own += each[1]
            else:
                others_ns += self.forecast.work_ns(each[0], each[1], size)
        start_ns = self.forecast.start_ns(curve, size, own, others_ns, now_ns)
        # Whoever comes until then joins, as far as there is room. A batch that is opened so late that no company fits
        # is a small one, and under overload every batch would be.
        company = own % size + rows
        if company < size:
            start_ns = max(start_ns, now_ns + self.policy.delay_ns)
            company += min(size - company, int(self.arrivals.per_ns(now_ns) * (start_ns - now_ns)))
        mean_ns = curve.mean_ns(company)
        # Errors of single batches partly cancel each other: they add up as the root of their number.
        batches = 1 + (start_ns > now_ns) + own // size // self.forecast.instances
        return start_ns - now_ns + mean_ns + CAUTION * (curve.high_ns(company) - mean_ns) * sqrt(batches)


def _rows(waiting: list[tuple[BatchKey, int]]) -> int:
    return sum(rows for _, rows in waiting)
