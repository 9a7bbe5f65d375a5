"""How many frames of a kind that costs the receiver more than the sender a peer may send."""


class Patience:
    """An allowance that is used up and comes back with time, ``rate`` a second, up to ``burst``."""

    __slots__ = ("_burst", "_left", "_rate", "_since_s")

    def __init__(self, burst: float, rate: float, now_s: float) -> None:
        self._burst = burst
        self._rate = rate
        self._left = burst
        self._since_s = now_s

    def bears(self, cost: float, now_s: float) -> bool:
        """Use up ``cost`` of it; whether there was so much."""
        self._left = min(self._burst, self._left + (now_s - self._since_s) * self._rate) - cost
        self._since_s = now_s
        return self._left >= 0
