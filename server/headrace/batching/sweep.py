"""When a queue that has no room looks for requests that nobody waits for any more. Pure: time is handed in."""

INTERVAL_NS = 10_000_000


class Sweep:
    """To look for them at each refusal would make overload worse, so that is done once in a while."""

    def __init__(self) -> None:
        self._swept_ns = -INTERVAL_NS

    def due(self, now_ns: int) -> bool:
        """Whether they are to be looked for now; whoever is told so lets go of them."""
        if now_ns - self._swept_ns <= INTERVAL_NS:
            return False
        self._swept_ns = now_ns
        return True
