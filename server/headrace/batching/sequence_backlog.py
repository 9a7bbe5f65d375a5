"""The sequences of one instance that have a request waiting and none running, and which of them run together.

Pure: no clock, no futures of its own.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from itertools import count
from math import ceil

from headrace.batching.pending import Pending
from headrace.batching.policy import BatchLimits, Take, Wait, decide
from headrace.core.sequence import SequenceSpec
from headrace.core.validation import BatchKey


class SequenceBacklog:
    """The heads of the sequences of an instance: the first waiting request of each.

    A batch has the oldest of one set of shapes. Where each sequence has a row to itself (``direct``) that is all of
    them, in the order of their rows. ``take`` is told of each head that goes into a batch, ``put_back`` of each
    that comes back, and says whether its sequence is still there; ``skip`` gives the heads that come after a dead one.
    """

    def __init__(
        self,
        limits: BatchLimits,
        spec: SequenceSpec,
        *,
        take: Callable[[Pending], None],
        put_back: Callable[[Pending], bool],
        skip: Callable[[Pending], list[Pending]],
    ) -> None:
        self._limits = limits
        self._direct = spec.strategy == "direct"
        self._enough = max(1, ceil(spec.minimum_slot_utilization * limits.max_rows))
        self._take = take
        self._put_back = put_back
        self._skip = skip
        self._groups: dict[BatchKey, list[tuple[int, int, Pending]]] = {}  # heaps: oldest first
        self._alone: deque[Pending] = deque()
        self._arrivals = count()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, pending: Pending) -> None:
        """One more head."""
        self._size += 1
        if pending.alone:
            self._alone.append(pending)
        else:
            group = self._groups.setdefault(pending.key, [])
            heappush(group, (pending.queued_at_ns, next(self._arrivals), pending))

    def put_back(self, pending: Iterable[Pending]) -> None:
        """Requests that were taken and could not be run: heads again, where their sequences are still there."""
        for one in pending:
            if self._put_back(one):
                self.add(one)

    def next_batch(self, now_ns: int) -> list[Pending] | Wait | None:
        """The batch to run now, or how long to wait for a better one, or None when nothing is here."""
        while self._size:
            if self._alone:
                batch = self._pop_alone()
            else:
                key, decision = self._choose(now_ns)
                if isinstance(decision, Wait):
                    return decision
                batch = self._pop(key, decision.rows)
            if batch:
                return batch
        return None

    def due_ns(self, now_ns: int) -> int:
        """When ``next_batch`` will have one: 0 for now. Only for a backlog that is not empty."""
        if self._alone or not self._limits.max_delay_ns:
            return 0
        decision = self._choose(now_ns)[1]
        return decision.until_ns if isinstance(decision, Wait) else 0

    def drop_dead(self) -> None:
        """Skip every head that nobody waits for."""
        for one in self.clear():
            if one.dead:
                self._pass_over(one)
            else:
                self.add(one)

    def clear(self) -> list[Pending]:
        """Every head, taken out."""
        everything = list(self)
        self._groups.clear()
        self._alone.clear()
        self._size = 0
        return everything

    def waiting_at(self, priority: int) -> int:  # noqa: ARG002 - sequences have no levels
        """Requests of a level: all, as there are no levels."""
        return self._size

    def levels(self) -> dict[int, int]:
        """Requests by level: there are none."""
        return {}

    def rows_before(self, priority: int, rank_ns: int) -> int:  # noqa: ARG002
        """Rows that go before a request which comes now; each head is one."""
        return self._size

    def __iter__(self) -> Iterator[Pending]:
        yield from self._alone
        for group in self._groups.values():
            for _, _, pending in group:
                yield pending

    def _choose(self, now_ns: int) -> tuple[BatchKey, Take | Wait]:
        """Of the groups that may go the one with the oldest head, else the one that may go first."""
        chosen: tuple[int, BatchKey, Take] | None = None
        soonest: tuple[BatchKey, Wait] | None = None
        for key, group in self._groups.items():
            oldest_ns = group[0][0]
            decision = self._decide(len(group), oldest_ns, now_ns)
            if isinstance(decision, Wait):
                if soonest is None or decision.until_ns < soonest[1].until_ns:
                    soonest = key, decision
            elif chosen is None or oldest_ns < chosen[0]:
                chosen = oldest_ns, key, decision
        if chosen is not None:
            return chosen[1:]
        assert soonest is not None, "a backlog with a size has a group"
        return soonest

    def _decide(self, rows: int, oldest_ns: int, now_ns: int) -> Take | Wait:
        if not self._direct:
            return decide(self._limits, rows, oldest_ns, now_ns)
        due_ns = oldest_ns + self._limits.max_delay_ns
        return Take(self._limits.max_rows) if rows >= self._enough or now_ns >= due_ns else Wait(due_ns)

    def _pop(self, key: BatchKey, rows: int) -> list[Pending]:
        batch: list[Pending] = []
        group = self._groups[key]
        while group and len(batch) < rows:
            _, _, one = heappop(group)
            self._size -= 1
            if one.dead:
                self._pass_over(one)
            else:
                self._take(one)
                batch.append(one)
        if not group:
            del self._groups[key]
        if self._direct:
            batch.sort(key=_slot)
        return batch

    def _pop_alone(self) -> list[Pending]:
        self._size -= 1
        one = self._alone.popleft()
        if one.dead:
            self._pass_over(one)
            return []
        self._take(one)
        return [one]

    def _pass_over(self, dead: Pending) -> None:
        for head in self._skip(dead):
            self.add(head)


def _slot(pending: Pending) -> int:
    return pending.slot
