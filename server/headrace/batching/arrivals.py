"""How many rows arrive a second just now. Pure: time is handed in."""

from math import exp


class ArrivalRate:
    """Rows counted with a weight that fades over ``horizon_ns``: so it is the rate of the last such time, roughly."""

    __slots__ = ("_horizon_ns", "_last_ns", "_weight")

    def __init__(self, horizon_ns: int) -> None:
        assert horizon_ns > 0, "a rate is of some time"
        self._horizon_ns = horizon_ns
        self._weight = 0.0
        self._last_ns = 0

    def arrived(self, rows: int, now_ns: int) -> None:
        """So many rows more. ``now_ns`` never goes back; if it does, it is taken for the last one."""
        passed_ns = now_ns - self._last_ns
        if passed_ns > 0:
            self._weight *= exp(-passed_ns / self._horizon_ns)
            self._last_ns = now_ns
        self._weight += rows

    def per_ns(self, now_ns: int) -> float:
        """Rows a nanosecond, as of now."""
        passed_ns = max(0, now_ns - self._last_ns)
        return self._weight * exp(-passed_ns / self._horizon_ns) / self._horizon_ns
