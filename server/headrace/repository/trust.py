"""When a form that was proved is not trusted any more because its workers die of requests."""

from collections import deque

MAX_DEATHS = 3  # of workers that ran a batch
WITHIN_NS = 600 * 10**9


class Trust:
    """One version's. One death may be anybody's doing, such as that of whoever was short of memory."""

    def __init__(self) -> None:
        self._deaths: deque[int] = deque(maxlen=MAX_DEATHS)

    def died(self, now_ns: int, *, used_up: bool) -> bool:
        """A worker died while it ran a batch. Returns whether that is enough.

        ``used_up`` says that a request was in it which another worker had died of before.
        """
        self._deaths.append(now_ns)
        return used_up or (len(self._deaths) == MAX_DEATHS and now_ns - self._deaths[0] <= WITHIN_NS)
