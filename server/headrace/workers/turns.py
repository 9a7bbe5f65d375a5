"""Whose turn it is on the CPUs: heavy batches of all models together never run on more threads than there are."""

import asyncio
from collections.abc import Callable
from time import monotonic_ns

from headrace.workers.fair_turns import FairTurns, Turn


class CpuTurns:
    """The async shell round ``FairTurns``: it only waits and wakes. One event loop owns it.

    Every model may use all CPUs while it is the only one at work, and two that are both busy take turns instead
    of running on twice as many threads as there are CPUs, which slows both.
    """

    def __init__(self, cpus: int, clock: Callable[[], int] = monotonic_ns) -> None:
        self.cpus = cpus
        self._clock = clock
        self._turns = FairTurns(cpus)
        self._wakers: dict[Turn, asyncio.Future[None]] = {}

    def resize(self, cpus: int) -> None:
        """There are so many CPUs now; whoever has a turn keeps it."""
        if cpus != self.cpus:
            self.cpus = cpus
            self._turns.resize(cpus)
            self._grant()

    def ask(self, threads: int, model: str = "", weight: float = 1.0) -> Turn:
        """Stand in line for ``threads`` threads. Either ``wait`` for them or ``drop`` the wish."""
        turn = Turn(model, threads, weight)
        self._turns.ask(turn)
        self._grant()
        return turn

    async def wait(self, turn: Turn) -> Turn:
        """Return when the turn has come; the threads are the caller's until ``give``. Cancelled, it is dropped."""
        if turn.granted_ns < 0:
            waker = self._wakers[turn] = asyncio.get_running_loop().create_future()
            try:
                await waker
            except asyncio.CancelledError:
                self.drop(turn)
                raise
        return turn

    async def take(self, threads: int, model: str = "", weight: float = 1.0) -> Turn:
        """``ask`` and ``wait``."""
        return await self.wait(self.ask(threads, model, weight))

    def give(self, turn: Turn, *, again: bool = False) -> Turn | None:
        """Return what was taken. With ``again`` its holder stands in line at once for another one, given back.

        Whoever has work left and asks a moment later would find that the threads have gone to somebody who has had
        more than he, for want of others: a model with short batches would run one for each long one of its rival.
        """
        following = None
        if again:
            following = Turn(turn.model, turn.threads, turn.weight)
            self._turns.ask(following)
        self._turns.end(turn, self._clock())
        self._grant()
        return following

    def drop(self, turn: Turn) -> None:
        """A turn is not wanted any more, be it granted or not."""
        self._wakers.pop(turn, None)
        if turn.granted_ns >= 0:
            self._turns.end(turn, turn.granted_ns)
        else:
            self._turns.withdraw(turn)
        self._grant()

    def _grant(self) -> None:
        for turn in self._turns.grants(self._clock()):
            waker = self._wakers.pop(turn, None)
            if waker is not None and not waker.done():
                waker.set_result(None)
