"""How far whoever makes responses may be ahead of whoever reads them."""

import asyncio


class Room:
    """Counts what is under way: up to ``responses``, and up to ``nbytes`` but for one response that is larger."""

    def __init__(self, responses: int, nbytes: int) -> None:
        self._most = responses
        self._most_bytes = nbytes
        self._ahead = 0
        self._ahead_bytes = 0
        self._there = asyncio.Event()
        self._there.set()

    async def wait(self) -> None:
        """Return when there is room for one more response."""
        await self._there.wait()

    def take(self, nbytes: int) -> None:
        """One more response is under way."""
        self._count(1, nbytes)

    def give(self, responses: int, nbytes: int) -> None:
        """So many have been read."""
        self._count(-responses, -nbytes)

    def _count(self, responses: int, nbytes: int) -> None:
        self._ahead += responses
        self._ahead_bytes += nbytes
        if self._ahead < self._most and self._ahead_bytes < self._most_bytes:
            self._there.set()
        else:
            self._there.clear()
