"""Whether a heavy model should wait for the clients of its last batch to come back. Pure: time is handed in."""

SHARE = 0.2  # of the last batch's time: the longest wait
MOST_NS = 10_000_000
MOST_SKIPPED = 63


class Regroup:
    """Clients that wait for their answers come back together, shortly after they were answered.

    An instance that takes the first few of them at once makes all others wait for a small batch, and so on for
    ever: eight gRPC clients of a MiniLM then run in batches of four, at two thirds of the throughput. So after a
    batch it waits, for a fraction of the batch's own time, until as many requests are there as can be expected.
    Where they do not come back (an open loop, slow clients) the waiting stops soon: each time that it was in vain
    it is left out for twice as many batches. A lone client is never waited for.
    """

    def __init__(self) -> None:
        self.expected = 0  # requests to wait for; none when it is decided
        self._until_ns = 0
        self._skip = 0  # batches to let pass without waiting
        self._skip_next = 1

    def ended(self, answered: int, waiting: int, most: int, execution_ns: int, now_ns: int) -> None:
        """A batch of ``answered`` requests has ended with ``waiting`` more in the queue; a batch holds ``most``."""
        self.expected = min(answered + waiting, most)
        self._until_ns = now_ns + min(int(execution_ns * SHARE), MOST_NS)
        if self._skip:
            self._skip -= 1
            self.expected = 0

    def wait_ns(self, waiting: int, now_ns: int) -> int:
        """How much longer to wait when ``waiting`` requests are in the queue; 0 to take the batch now."""
        if self.expected <= 1:
            return 0
        if waiting < self.expected and now_ns < self._until_ns:
            return self._until_ns - now_ns
        if waiting >= self.expected:
            self._skip_next = 1
        else:
            self._skip = self._skip_next
            self._skip_next = min(2 * self._skip_next, MOST_SKIPPED)
        self.expected = 0
        return 0
