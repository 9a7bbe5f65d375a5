"""What waits for a model, grouped by what may share a batch. Pure: no clock, no futures of its own."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from headrace.batching.pending import Pending
from headrace.batching.policy import BatchLimits, Take, Wait, decide
from headrace.core.validation import BatchKey


class AnyBacklog(Protocol):
    """What a queue needs of whatever holds its requests."""

    def __len__(self) -> int:
        """How many could be taken, given time."""

    def add(self, pending: Pending) -> None:
        """One more."""

    def put_back(self, pending: Iterable[Pending]) -> None:
        """Requests that were taken and could not be run."""

    def next_batch(self, now_ns: int) -> list[Pending] | Wait | None:
        """The batch to run now, or how long to wait for a better one, or None when nothing is here."""

    def due_ns(self, now_ns: int) -> int:
        """When ``next_batch`` will have one: 0 for now. Only for a backlog that is not empty."""

    def drop_dead(self) -> None:
        """Forget every request that nobody waits for."""

    def clear(self) -> list[Pending]:
        """Everything, taken out."""


class _Group:
    """Requests of one priority and one set of shapes, oldest first."""

    __slots__ = ("pending", "rows")

    def __init__(self) -> None:
        self.pending: deque[Pending] = deque()
        self.rows = 0


class Backlog:
    """The waiting requests of one model version.

    Lower priority numbers go first, and within a priority the group whose head has waited longest. Requests
    that must run alone go before all, since they have waited once already.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._groups: dict[tuple[int, BatchKey], _Group] = {}
        self._alone: deque[Pending] = deque()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, pending: Pending) -> None:
        """One more at the end of its group."""
        group = self._groups.get((pending.priority, pending.key))
        if group is None:
            group = self._groups[(pending.priority, pending.key)] = _Group()
        group.pending.append(pending)
        group.rows += pending.rows or 1
        self._size += 1

    def put_back(self, pending: Iterable[Pending]) -> None:
        """Requests that were taken and could not be run, to the front again, in their order."""
        for one in reversed(list(pending)):
            self._size += 1
            if one.alone:
                self._alone.appendleft(one)
                continue
            group = self._groups.setdefault((one.priority, one.key), _Group())
            group.pending.appendleft(one)
            group.rows += one.rows or 1

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
        """Forget every request that nobody waits for, so that the living get their places."""
        for one in self.clear():
            if one.dead:
                one.bury()
            elif one.alone:
                self._alone.append(one)
                self._size += 1
            else:
                self.add(one)

    def clear(self) -> list[Pending]:
        """Everything, taken out."""
        everything = list(self)
        self._groups.clear()
        self._alone.clear()
        self._size = 0
        return everything

    def __iter__(self) -> Iterator[Pending]:
        yield from self._alone
        for group in self._groups.values():
            yield from group.pending

    def _choose(self, now_ns: int) -> tuple[tuple[int, BatchKey], Take | Wait]:
        if len(self._groups) == 1:
            (key, group), *_ = self._groups.items()
            return key, decide(self._limits, group.rows, group.pending[0].queued_at_ns, now_ns)
        best: tuple[int, int] | None = None
        chosen: tuple[tuple[int, BatchKey], Take | Wait] | None = None
        soonest: tuple[tuple[int, BatchKey], Wait] | None = None
        for key, group in self._groups.items():
            oldest_ns = group.pending[0].queued_at_ns
            decision = decide(self._limits, group.rows, oldest_ns, now_ns)
            if isinstance(decision, Wait):
                if soonest is None or decision.until_ns < soonest[1].until_ns:
                    soonest = key, decision
            elif best is None or (key[0], oldest_ns) < best:
                best, chosen = (key[0], oldest_ns), (key, decision)
        found = chosen or soonest
        assert found is not None, "a backlog with a size has a group"
        return found

    def _pop(self, key: tuple[int, BatchKey], rows: int) -> list[Pending]:
        group = self._groups[key]
        waiting = group.pending
        batch: list[Pending] = []
        room = rows
        while waiting:
            one = waiting[0]
            weight = one.rows or 1
            if one.dead:
                one.bury()
            elif batch and weight > room:
                break
            else:
                batch.append(one)
                room -= weight
            waiting.popleft()
            group.rows -= weight
            self._size -= 1
            if room <= 0:
                break
        if not waiting:
            del self._groups[key]
        return batch

    def _pop_alone(self) -> list[Pending]:
        self._size -= 1
        one = self._alone.popleft()
        if one.dead:
            one.bury()
            return []
        return [one]
