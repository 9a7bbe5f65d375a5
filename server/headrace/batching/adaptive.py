"""The policy that chooses batch sizes and delays by itself, from a latency curve and an objective. Pure."""

from headrace.batching.arrivals import ArrivalRate
from headrace.batching.budget import Budget
from headrace.batching.curve import LatencyCurve, LatencyCurves
from headrace.batching.forecast import Forecast
from headrace.batching.policy import BatchLimits, Take, Wait
from headrace.core.validation import BatchKey

USED = 0.95  # of the objective is planned with; the rest is for everything but queue and model
LONGEST = 0.65  # of that: no batch takes longer
CROWDING = 0.5  # what it costs, of the goodput, if those who just missed the batch before come too late by all of it
LENGTH = 0.1  # what a batch costs that takes all of it: a burst ends with less work at hand, noise has more to act on
SHRINK = 0.85  # from one size that is tried to the next
TRIED = 14  # sizes, so that the smallest is a tenth of the largest
FRESH = 64  # batches after which the size is looked at every eighth batch only
WORTHWHILE = 0.5  # of the time that merging saves: the longest that filling a batch may take


class AdaptivePolicy:
    """Batches of the size that serves most requests within the objective, for as long as the load lasts.

    That size is a property of the curve, not of the moment. A request that has just missed a batch waits for it to end
    and then runs itself, so a batch may take about half of the objective, and more only where the throughput that this
    wins outweighs those that come too late by it. What waits beyond the size is left for the next batch. To take more
    while the oldest can bear it, or less where it cannot, was simulated and is worse: the one shuts out who comes next,
    the other ends in batches of one under overload, and what was promised at admission is kept by neither.

    Fewer rows go at once, unless others are about to fill the batch: in less time than running them apart would cost,
    with no other instance idle, and with the oldest still in time.
    """

    waits = True
    delay_ns = 0

    def __init__(
        self, limits: BatchLimits, budget: Budget, curves: LatencyCurves, forecast: Forecast, arrivals: ArrivalRate
    ) -> None:
        self._most = limits.max_rows
        self._budget = budget
        self._curves = curves
        self._forecast = forecast
        self._arrivals = arrivals
        self._sizes: dict[LatencyCurve, tuple[int, int]] = {}  # with the age of the curve that each is by
        self._waiting_since_ns = 0
        self.waited_ns = 0  # in all, for company
        self.target = 1  # the size that was aimed at last

    def size(self, curve: LatencyCurve) -> int:
        """The rows that its batches have when enough are waiting."""
        age = curve.batches if curve.batches < FRESH else curve.batches >> 3
        known = self._sizes.get(curve)
        if known is not None and known[0] == age:
            return known[1]
        size = self._best_size(curve)
        if len(self._sizes) > 2 * len(self._curves):
            self._sizes.clear()  # there are those of curves that made room for others
        self._sizes[curve] = (age, size)
        return size

    def decide(self, key: BatchKey, rows: int, oldest_ns: int, now_ns: int) -> Take | Wait:
        """What an idle instance should do, given ``rows`` waiting of which the oldest came at ``oldest_ns``."""
        curve = self._curves.of(key)
        if curve is None:
            self.target = 1
            return Take(1)  # one tells a little about two, two about four
        size = self.target = self.size(curve)
        if rows < size:
            until_ns = self._worth_waiting_until_ns(curve, size, rows, oldest_ns, now_ns)
            if until_ns:
                self._waiting_since_ns = self._waiting_since_ns or now_ns
                return Wait(until_ns)
        if self._waiting_since_ns:
            self.waited_ns += now_ns - self._waiting_since_ns
            self._waiting_since_ns = 0
        return Take(min(rows, size))

    def _best_size(self, curve: LatencyCurve) -> int:
        planned_ns = USED * self._budget.objective_ns
        known = curve.known_rows
        if curve.is_point and 2 * curve.mean_ns(known) <= planned_ns:
            return min(2 * known, self._most)  # nothing tells what a larger one takes, so it is tried
        best, most_good = 1, 0.0
        size = float(max(1, min(curve.most_rows(LONGEST * planned_ns), 2 * known, self._most)))
        for _ in range(TRIED):
            rows = max(1, round(size))
            took = max(1.0, curve.hopeful_ns(rows)) / planned_ns
            good = rows / took * (1 - CROWDING * max(0.0, 2 * took - 1) - LENGTH * took)
            if good > most_good:
                best, most_good = rows, good
            if rows == 1:
                break
            size *= SHRINK
        return best

    def _worth_waiting_until_ns(self, curve: LatencyCurve, size: int, rows: int, oldest_ns: int, now_ns: int) -> int:
        """When to stop waiting for the batch to fill; 0 to take what is there."""
        rate = self._arrivals.per_ns(now_ns)
        missing = size - rows
        saved_ns = WORTHWHILE * (curve.mean_ns(rows) + curve.mean_ns(missing) - curve.mean_ns(size))
        if missing >= rate * saved_ns:
            return 0
        since_ns = max(self._waiting_since_ns, oldest_ns) if self._waiting_since_ns else now_ns
        until_ns = int(since_ns + saved_ns)
        latest_ns = oldest_ns + self._budget.ns - curve.high_ns(size)
        if not now_ns < until_ns <= latest_ns:
            return 0
        free_ns = self._forecast.free_ns(now_ns)
        return 0 if len(free_ns) > 1 and free_ns[1] <= now_ns else until_ns
