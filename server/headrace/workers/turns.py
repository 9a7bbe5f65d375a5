"""Whose turn it is on the CPUs: heavy batches of all models together never run on more threads than there are."""

import asyncio
from collections import deque


class CpuTurns:
    """CPU threads, lent out first come first served. One event loop owns it.

    Every model may use all CPUs while it is the only one at work, and two that are both busy take turns instead
    of running on twice as many threads as there are CPUs, which slows both.
    """

    def __init__(self, cpus: int) -> None:
        self.cpus = cpus
        self._free = cpus
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, threads: int) -> None:
        """Wait for ``threads`` threads; they are the caller's until ``give``."""
        if not self._waiting and threads <= self._free:
            self._free -= threads
            return
        turn = asyncio.get_running_loop().create_future()
        entry = (threads, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(threads)  # the turn came together with the cancellation
            else:
                if entry in self._waiting:
                    self._waiting.remove(entry)
                self._grant()
            raise

    def give(self, threads: int) -> None:
        """Return what was taken."""
        self._free += threads
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            threads, turn = self._waiting[0]
            if turn.done():  # cancelled, and its task has not run since
                self._waiting.popleft()
                continue
            if threads > self._free:
                return
            self._waiting.popleft()
            self._free -= threads
            turn.set_result(None)
