"""Those who sleep at a queue until there is a batch for them to take."""

import asyncio
from collections import deque
from collections.abc import Callable


class Takers:
    """Tasks, of which one at a time is woken: at once, or when a batch that waits for company is due.

    A wake-up is never lost: one who leaves with it passes it on. ``sleeping`` is empty while nobody sleeps: the queue
    looks at that first, so that a request which comes meanwhile costs nothing here.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self.sleeping: deque[asyncio.Future[None]] = deque()
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None

    async def sleep(self) -> None:
        """Return when it is this one's turn to look."""
        waiter = asyncio.get_running_loop().create_future()
        self.sleeping.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self.sleeping:
                self.sleeping.remove(waiter)
            else:
                self.wake()  # it was told of work that it will not do now
            raise

    def wake(self) -> None:
        """Tell one of them, the one that has slept longest."""
        while self.sleeping:
            waiter = self.sleeping.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def wake_at(self, until_ns: int) -> None:
        """Tell one of them at this time by the clock, and at no other that was asked for before."""
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, (until_ns - self._clock()) * 1e-9)
        self._timer = asyncio.get_running_loop().call_later(delay_s, self.wake)
