"""The HTTP connections of one client, each used by one thread at a time."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

import httpx

# Shorter than servers keep idle connections (Headrace: 75 s), so that no request meets one that is being closed.
KEEP_IDLE_S = 30.0


class ConnectionPool:
    """Hands out httpx clients of one connection each, the last used first; any thread may ask.

    One httpx client for all threads would be simpler, but where threads outnumber connections its pool closes some that
    are in use: it takes an idle connection that can be read from for one that the server has closed, and another thread
    may have sent its request between the two looks. Six threads on three connections lost 2 to 58 of 4,800 calls so
    (httpcore 1.0.9), and none with that check taken out.
    """

    def __init__(self, make: Callable[[], httpx.Client], max_connections: int) -> None:
        self._make = make
        self._room = threading.BoundedSemaphore(max_connections)
        self._lock = threading.Lock()
        self._free: deque[tuple[float, httpx.Client]] = deque()  # since when each has been idle, the longest first
        self._closed = False

    @contextmanager
    def taken(self, timeout_s: float | None) -> Iterator[httpx.Client]:
        """A client for this caller alone.

        Raises:
            TimeoutError: all are in use for longer than ``timeout_s``.
        """
        if not self._room.acquire(timeout=timeout_s):
            raise TimeoutError("every connection is in use")
        try:
            client = self._take() or self._make()
            try:
                yield client
            finally:
                self._give_back(client)
        finally:
            self._room.release()

    def close(self) -> None:
        """End the idle connections now, and those in use when their calls end."""
        with self._lock:
            self._closed = True
            idle = list(self._free)
            self._free.clear()
        for _, client in idle:
            client.close()

    def _take(self) -> httpx.Client | None:
        with self._lock:
            return self._free.pop()[1] if self._free else None

    def _give_back(self, client: httpx.Client) -> None:
        now = monotonic()
        unwanted: list[httpx.Client] = []
        with self._lock:
            if self._closed:
                unwanted.append(client)
            else:
                self._free.append((now, client))
                while now - self._free[0][0] > KEEP_IDLE_S:
                    unwanted.append(self._free.popleft()[1])
        for one in unwanted:
            one.close()
