"""For how long a worker looks out for its next batch before it sleeps. Pure: waits are handed in, and so are CPUs."""

LOOK_NS = 300_000  # the most; a client that asks again at once takes less
_ENOUGH_CPUS = 2  # for the worker to look out while its client is computing; with fewer it would keep that from running
_LONE_REQUESTS = 2  # a batch of no more has hardly any company


class Lookout:
    """Waking a process takes about as long as running a small model, so a worker that is needed soon stays awake.

    That is where one client or two send their next request as soon as they have an answer. A worker whose batches are
    larger has more to do than to wait, and the clients and the front process need the CPUs; one that is asked now and
    then would look out in vain.
    """

    def __init__(self, cpus: int) -> None:
        self._may = cpus >= _ENOUGH_CPUS
        self._alone = False
        self._soon = False

    def ran(self, requests: int) -> None:
        """A batch of so many requests has been answered."""
        self._alone = requests <= _LONE_REQUESTS

    def waited(self, nanoseconds: int) -> None:
        """It has taken so long until there was something to do again."""
        self._soon = nanoseconds <= LOOK_NS

    @property
    def look_ns(self) -> int:
        """For how long to look out now; 0: sleep at once."""
        return LOOK_NS if self._may and self._alone and self._soon else 0
