"""A fair sample of a stream of unknown length, bounded by number and by bytes."""

import heapq
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Reservoir(Generic[Item]):
    """Keeps items so that each that was offered is there with the same chance, however large it is.

    Every item draws a number, and those with the lowest numbers are kept: as many as both bounds allow. So when bytes
    run out it is chance that decides who goes, and not size (but for the one that is just too large for what is left).
    What is larger than all the room is never kept.
    """

    def __init__(self, most: int, most_bytes: int, random: Random) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._random = random
        self._heap: list[tuple[float, int, Item, int]] = []  # the highest number first, so that it goes first
        self._limit = 1.0  # numbers from here on have been turned away, so all later ones are
        self._ticket = count()  # between equal numbers, since items need not be comparable
        self.nbytes = 0
        self.too_large = 0

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, nbytes: int, make: Callable[[], Item]) -> None:
        """Offer an item of a size. ``make`` is called only where it is kept, for now at least."""
        if nbytes > self._most_bytes:
            self.too_large += 1
            return
        number = self._random.random()
        if number >= self._limit:
            return
        heapq.heappush(self._heap, (-number, next(self._ticket), make(), nbytes))
        self.nbytes += nbytes
        while len(self._heap) > self._most or self.nbytes > self._most_bytes:
            turned_away, _, _, size = heapq.heappop(self._heap)
            self.nbytes -= size
            self._limit = -turned_away

    def items(self) -> list[Item]:
        """What is kept, in the order in which it came."""
        return [item for _, _, item, _ in sorted(self._heap, key=lambda entry: entry[1])]
