"""Those who wait until a queue has nothing more to answer."""

import asyncio


class Drain:
    """All of them are told when nothing is left; whoever is told has to look whether that still holds.

    ``waiting`` is empty while nobody waits: the queue looks at that first, so that the end of a batch costs nothing
    here as long as the model serves.
    """

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []

    async def wait(self) -> None:
        """Return when nothing was left."""
        waiter = asyncio.get_running_loop().create_future()
        self.waiting.append(waiter)
        await waiter

    def tell(self) -> None:
        """Nothing is left now."""
        for waiter in self.waiting:
            if not waiter.done():
                waiter.set_result(None)
        self.waiting.clear()
