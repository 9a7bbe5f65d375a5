"""How much of a latency objective predictions may use, learned from how they turned out. Pure."""

MISSES = 0.005  # the share of late answers that is steered for: half of what a p99 allows
STEP = 0.005  # of the objective: what one late answer takes off the budget
WORST = 0.1  # of the objective: what one batch takes off at most
FIRST = 0.9  # of the objective, until something is known
PULL = 0.1  # of the objective: so far under the first budget, the way back is twice as fast
LEAST = 0.4  # of the objective: the budget never gets smaller, so that a bad minute does not close the model
MOST = 0.97  # nor larger: the answer has yet to be written


class Budget:
    """The time that a request may be predicted to take and still be accepted.

    Predictions are wrong at times, by how much depends on the machine, and nobody knows beforehand. So a late answer
    makes the budget smaller and a timely one makes it a little larger, in such a proportion that it stays where it is
    while ``MISSES`` of the answers are late. Far down the way back is faster: with a small budget there are few
    answers to learn from.
    """

    __slots__ = ("late", "ns", "objective_ns", "timely")

    def __init__(self, objective_ns: int) -> None:
        assert objective_ns > 0, "an objective of no time cannot be met"
        self.objective_ns = objective_ns
        self.ns = FIRST * objective_ns
        self.timely = 0  # answers within the objective
        self.late = 0

    def answered(self, timely: int, late: int, *, learn: bool = True) -> None:
        """Requests of one batch were answered, so many within the objective and so many after it.

        They are counted in any case. Nothing is learned from those that were accepted before anything was known.
        """
        self.timely += timely
        self.late += late
        if not learn:
            return
        objective_ns = self.objective_ns
        below = max(0.0, FIRST - self.ns / objective_ns) / PULL
        change = STEP * (MISSES * (1 + below * below) * timely - (1 - MISSES) * late)
        self.ns = objective_ns * min(MOST, max(LEAST, self.ns / objective_ns + max(-WORST, change)))
