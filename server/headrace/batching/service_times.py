"""How long a model's batches take by their rows, as far as that was seen lately. Pure: times are handed in."""

MEAN_SHARE = 1 / 8  # of a new observation in the mean
SPREAD_SHARE = 1 / 4  # and in the mean deviation
CERTAINTY = 2  # deviations that the estimate stays below the mean
FORGOTTEN_NS = 1_000_000_000  # and twice a batch's time: what was last seen before is not known any more


class _Size:
    """Batches of about one size: decayed means of rows and times."""

    __slots__ = ("mean_ns", "rows", "seen_at_ns", "spread_ns")

    def __init__(self, rows: int, took_ns: int, now_ns: int) -> None:
        self.rows = float(rows)
        self.mean_ns = float(took_ns)
        self.spread_ns = took_ns / 2  # one observation proves nothing
        self.seen_at_ns = now_ns

    def add(self, rows: int, took_ns: int, now_ns: int) -> None:
        self.rows += (rows - self.rows) * MEAN_SHARE
        self.spread_ns += (abs(took_ns - self.mean_ns) - self.spread_ns) * SPREAD_SHARE
        self.mean_ns += (took_ns - self.mean_ns) * MEAN_SHARE
        self.seen_at_ns = now_ns

    def known_at(self, now_ns: int) -> bool:
        return now_ns - self.seen_at_ns <= FORGOTTEN_NS + 2 * self.mean_ns

    def least_ns(self, rows: int) -> float:
        """What a batch of so many rows hardly undercuts: a smaller one may gain as much as it has fewer rows."""
        return max(0.0, self.mean_ns - CERTAINTY * self.spread_ns) * min(1.0, rows / self.rows)


class ServiceTimes:
    """Estimates from below, so that whoever trusts them promises too much rather than too little.

    Sizes are told apart by powers of two. What has not been seen for a while is forgotten: it may have been the
    slowness of a moment, and a model that is refused all work could never show that it is fast again.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def observe(self, rows: int, took_ns: int, now_ns: int) -> None:
        """A batch of ``rows`` has taken so long in its worker."""
        size = self._sizes.get(rows.bit_length())
        if size is None or not size.known_at(now_ns):
            self._sizes[rows.bit_length()] = _Size(rows, took_ns, now_ns)
        else:
            size.add(rows, took_ns, now_ns)

    def batch_ns(self, rows: int, now_ns: int) -> int | None:
        """What a batch of so many rows takes at the least; None while that is not known."""
        known = [one for one in self._sizes.values() if one.known_at(now_ns)]
        if not known:
            return None
        return int(max(one.least_ns(rows) for one in known))
