"""Requests that are pressed for time, the most pressing first. Pure: no clock."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from headrace.batching.pending import Pending


class Urgent:
    """Requests in the order of their ``rank_ns``; of equal ones the first comer goes first.

    Sorted lists of plain numbers beside the requests: as many as a queue may hold are moved and summed up in
    microseconds, and the rows that go before a given time are wanted for each request that comes with a deadline.
    """

    __slots__ = ("_pending", "_ranks", "_rows")

    def __init__(self) -> None:
        self._ranks: list[int] = []
        self._rows: list[int] = []
        self._pending: list[Pending] = []

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[Pending]:
        return iter(self._pending)

    @property
    def rank_ns(self) -> int:
        """The first one's."""
        return self._ranks[0]

    @property
    def first(self) -> Pending:
        """The most pressing one."""
        return self._pending[0]

    def add(self, pending: Pending) -> None:
        """One more, behind its equals."""
        self._insert(bisect_right(self._ranks, pending.rank_ns), pending)

    def put_back(self, pending: Pending) -> None:
        """One that was taken and could not be run, before its equals."""
        self._insert(bisect_left(self._ranks, pending.rank_ns), pending)

    def pop(self) -> Pending:
        """The most pressing one, taken out."""
        del self._ranks[0], self._rows[0]
        return self._pending.pop(0)

    def rows_before(self, rank_ns: int) -> int:
        """Rows of those that go before one of that rank which comes now."""
        return sum(self._rows[: bisect_right(self._ranks, rank_ns)])

    def _insert(self, index: int, pending: Pending) -> None:
        self._ranks.insert(index, pending.rank_ns)
        self._rows.insert(index, pending.rows or 1)
        self._pending.insert(index, pending)
