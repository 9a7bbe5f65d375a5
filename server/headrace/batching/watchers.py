"""Those who wait for a queue to grow."""

import asyncio


class Watchers:
    """Futures, each with the number of requests that it waits for.

    ``size`` is the smallest of those numbers, 0 while nobody waits: the queue compares it with what it has whenever a
    request comes, and calls ``tell`` only where somebody is to be told.
    """

    def __init__(self) -> None:
        self.size = 0
        self._watching: list[tuple[int, asyncio.Future[None]]] = []

    def add(self, size: int) -> asyncio.Future[None]:
        """A future that is done as soon as ``size`` requests wait; only for a queue of fewer.

        Whoever waits for it may set or cancel it too, and for another reason.
        """
        watching = [one for one in self._watching if not one[1].done()]
        grown: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watching.append((size, grown))
        self._watching = watching
        self.size = min(each for each, _ in watching)
        return grown

    def tell(self, waiting: int) -> None:
        """So many requests wait now."""
        left = []
        for size, grown in self._watching:
            if size > waiting:
                left.append((size, grown))
            elif not grown.done():
                grown.set_result(None)
        self._watching = left
        self.size = min((size for size, _ in left), default=0)
