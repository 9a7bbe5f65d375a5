"""Whether a request that comes with a deadline can still be answered in time. Pure: times are handed in."""

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Protocol


class BatchTimes(Protocol):
    """What is known of a model's speed."""

    def observe(self, rows: int, took_ns: int, now_ns: int) -> None:
        """A batch of ``rows`` has taken so long in its worker."""

    def batch_ns(self, rows: int, now_ns: int) -> int | None:
        """What a batch of so many rows takes at the least; None while that is not known."""


class Admission:
    """Foretells when a request would be answered at the earliest, if all goes well from now on.

    Those ahead are taken to run in full batches, spread perfectly over all instances, and nobody with a higher priority
    or an earlier deadline is taken to come. So what is refused would not have been answered in time, unless the model
    has become faster than it was lately.
    """

    def __init__(self, times: BatchTimes, instances: int = 1) -> None:
        self.max_rows = 1  # of a batch; set when the model file has told
        self._times = times
        self.instances = max(1, instances)

    def observe(self, rows: int, took_ns: int, now_ns: int) -> None:
        """A batch of ``rows`` has taken so long in its worker."""
        self._times.observe(rows, took_ns, now_ns)

    def finish_ns(self, rows_ahead: int, rows: int, running: Iterable[tuple[int, int]], now_ns: int) -> int | None:
        """Nanoseconds from now until a request of ``rows`` is answered at the earliest; None while that is not known.

        ``rows_ahead`` go before it. ``running`` are the batches that were taken already, be they run or staged, each
        with the time since when it can have run and its rows at the least, in the order in which they were taken.
        """
        most = self.max_rows
        own_ns = self._times.batch_ns(min(rows, most), now_ns)
        full_ns = self._times.batch_ns(most, now_ns)
        if own_ns is None or full_ns is None:
            return None
        free_at = self._free_at(running, now_ns)
        full_rounds, more = divmod(rows_ahead // most + (rows - 1) // most, self.instances)
        for _ in range(more):
            heappush(free_at, heappop(free_at) + full_ns)
        return free_at[0] + full_rounds * full_ns + own_ns

    def _free_at(self, running: Iterable[tuple[int, int]], now_ns: int) -> list[int]:
        """When each instance can take the next batch, from now on; a heap."""
        free_at = [0] * self.instances
        for number, (since_ns, rows) in enumerate(running):
            takes_ns = self._times.batch_ns(min(rows, self.max_rows), now_ns) or 0
            if number < self.instances:
                heappop(free_at)  # one that is idle, as long as there are more instances than batches
                heappush(free_at, max(0, since_ns + takes_ns - now_ns))
            else:
                heappush(free_at, heappop(free_at) + takes_ns)  # staged behind the one that ends first
        return free_at
