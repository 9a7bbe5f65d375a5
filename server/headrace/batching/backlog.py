"""What waits for a model, grouped by what may share a batch. Pure: no clock, no futures of its own."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from headrace.batching.pending import HORIZON_NS, Pending
from headrace.batching.policy import BatchLimits, FixedPolicy, Policy, Take, Wait
from headrace.batching.urgent import Urgent
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

    def waiting_at(self, priority: int) -> int:
        """Requests of a level; all, where there are no levels."""

    def levels(self) -> dict[int, int]:
        """Requests by level; empty where there are none."""

    def rows_before(self, priority: int, rank_ns: int) -> int:
        """Rows that would go before a request of that level and rank which comes now, at the least."""


GroupKey = tuple[int, bool, BatchKey]  # priority, whether they are late, shapes


class _Group:
    """Requests of one priority and one set of shapes: those that wait their turn, oldest first, and the pressing."""

    __slots__ = ("pending", "rows", "urgent")

    def __init__(self) -> None:
        self.pending: deque[Pending] = deque()
        self.urgent: Urgent | None = None  # made when it is needed: most models never see a deadline
        self.rows = 0

    @property
    def rank_ns(self) -> int:
        """How pressing its first request is."""
        pending, urgent = self.pending, self.urgent
        if urgent is None:
            return pending[0].queued_at_ns + HORIZON_NS
        return min(urgent.rank_ns, pending[0].queued_at_ns + HORIZON_NS) if pending else urgent.rank_ns

    @property
    def oldest_ns(self) -> int:
        """When the first of its requests came."""
        came_ns = [self.pending[0].queued_at_ns] if self.pending else []
        return min([*came_ns, *(one.queued_at_ns for one in self.urgent or ())])

    def since_ns(self, max_delay_ns: int) -> int:
        """From when on it has been waiting for company.

        One that is pressed gives at most half of its time for that: it counts as having waited for longer.
        """
        since_ns = self.pending[0].queued_at_ns if self.pending else 0
        for one in self.urgent or ():
            pressed_ns = min(one.queued_at_ns, (one.queued_at_ns + one.rank_ns) // 2 - max_delay_ns)
            since_ns = min(since_ns, pressed_ns) if since_ns else pressed_ns
        return since_ns

    def press(self) -> Urgent:
        """Where its pressing ones are."""
        if self.urgent is None:
            self.urgent = Urgent()
        return self.urgent

    def pop(self) -> Pending:
        """The first one, taken out."""
        pending, urgent = self.pending, self.urgent
        if urgent is None or (pending and pending[0].queued_at_ns + HORIZON_NS < urgent.rank_ns):
            return pending.popleft()
        one = urgent.pop()
        if not urgent:
            self.urgent = None
        return one

    @property
    def first(self) -> Pending:
        """The one that ``pop`` would take out."""
        pending, urgent = self.pending, self.urgent
        if urgent is None or (pending and pending[0].queued_at_ns + HORIZON_NS < urgent.rank_ns):
            return pending[0]
        return urgent.first


class Backlog:
    """The waiting requests of one model version.

    Lower priority numbers go first, and within a priority the group whose head is most pressing: whose deadline is
    nearest, or who has waited longest. Late ones go behind the others of their priority. Requests that must run
    alone go before all others of their priority, since they have waited once already.
    """

    def __init__(self, limits: BatchLimits, policy: Policy | None = None) -> None:
        self._limits = limits
        self._policy = policy or FixedPolicy(limits)
        self._groups: dict[GroupKey, _Group] = {}
        self._alone: deque[Pending] = deque()
        self._size = 0
        self._at_level: dict[int, int] = {}  # requests; empty where there are no levels

    def __len__(self) -> int:
        return self._size

    def add(self, pending: Pending) -> None:
        """One more at the end of its group, or where its deadline puts it."""
        priority = pending.priority
        key = (priority, False, pending.key)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
        if pending.rank_ns:
            group.press().add(pending)
        else:
            group.pending.append(pending)
        group.rows += pending.rows or 1
        self._size += 1
        if priority:
            self._count(priority, 1)

    def put_back(self, pending: Iterable[Pending]) -> None:
        """Requests that were taken and could not be run, to the front again, in their order."""
        for one in reversed(list(pending)):
            self._size += 1
            if one.priority:
                self._count(one.priority, 1)
            if one.alone:
                self._alone.appendleft(one)
                continue
            group = self._groups.setdefault((one.priority, False, one.key), _Group())
            group.rows += one.rows or 1
            if one.rank_ns:
                group.press().put_back(one)
                continue
            waiting = group.pending
            waiting.appendleft(one)
            if len(waiting) > 1 and waiting[1].queued_at_ns < one.queued_at_ns:
                # Another instance has put back older ones before.
                group.pending = deque(sorted(waiting, key=lambda it: it.queued_at_ns))

    def next_batch(self, now_ns: int) -> list[Pending] | Wait | None:
        """The batch to run now, or how long to wait for a better one, or None when nothing is here."""
        while self._size:
            if self._alone and not (self._at_level and self._outranks_alone(now_ns)):
                batch = self._pop_alone()
            else:
                key, decision = self._choose(now_ns)
                if isinstance(decision, Wait):
                    return decision
                batch = self._pop(key, decision.rows, now_ns)
            if batch:
                return batch
        return None

    def due_ns(self, now_ns: int) -> int:
        """When ``next_batch`` will have one: 0 for now. Only for a backlog that is not empty."""
        if self._alone or not self._policy.waits:
            return 0
        decision = self._choose(now_ns)[1]
        return decision.until_ns if isinstance(decision, Wait) else 0

    def ahead(self, priority: int) -> Iterator[tuple[BatchKey, int]]:
        """The rows that wait and would run before a request of this priority that comes now, by what shares a batch.

        A request that runs alone counts as one of a key of its own.
        """
        for one in self._alone:
            if one.priority <= priority:
                yield one.key, one.rows or 1
        for (level, late, key), group in self._groups.items():
            if level < priority or (level == priority and not late):
                yield key, group.rows

    def oldest(self) -> tuple[BatchKey, int, int] | None:
        """Key, rows and arrival of the group whose head has waited longest; None where there is no group."""
        if not self._groups:
            return None
        (*_, key), group = min(self._groups.items(), key=lambda item: item[1].oldest_ns)
        return key, group.rows, group.oldest_ns

    def drop_dead(self) -> None:
        """Forget every request that nobody waits for, so that the living get their places."""
        for one in self.clear():
            if one.dead:
                one.bury()
            elif one.alone:
                self._alone.append(one)
                self._size += 1
                if one.priority:
                    self._count(one.priority, 1)
            else:
                self.add(one)

    def clear(self) -> list[Pending]:
        """Everything, taken out."""
        everything = list(self)
        self._groups.clear()
        self._alone.clear()
        self._at_level.clear()
        self._size = 0
        return everything

    def waiting_at(self, priority: int) -> int:
        """Requests of a level; all, where there are no levels."""
        return self._at_level.get(priority, 0) if priority else self._size

    def levels(self) -> dict[int, int]:
        """Requests by level; empty where there are none."""
        return dict(self._at_level)

    def rows_before(self, priority: int, rank_ns: int) -> int:
        """Rows that would go before a request of that level and rank which comes now, at the least."""
        rows = sum(one.rows or 1 for one in self._alone if one.priority <= priority)
        for (level, late, _), group in self._groups.items():
            if level < priority:
                rows += group.rows
            elif level == priority and not late:
                if not rank_ns:
                    rows += group.rows
                elif group.urgent is not None:
                    rows += group.urgent.rows_before(rank_ns)
        return rows

    def __iter__(self) -> Iterator[Pending]:
        yield from self._alone
        for group in self._groups.values():
            yield from group.pending
            yield from group.urgent or ()

    def _count(self, priority: int, more: int) -> None:
        count = self._at_level.get(priority, 0) + more
        if count:
            self._at_level[priority] = count
        else:
            del self._at_level[priority]

    def _choose(self, now_ns: int) -> tuple[GroupKey, Take | Wait]:
        max_delay_ns = self._limits.max_delay_ns
        if len(self._groups) == 1:
            (key, group), *_ = self._groups.items()
            since_ns = group.pending[0].queued_at_ns if group.urgent is None else group.since_ns(max_delay_ns)
            return key, self._policy.decide(key[2], group.rows, since_ns, now_ns)
        best: tuple[int, bool, int] | None = None
        chosen: tuple[GroupKey, Take | Wait] | None = None
        soonest: tuple[GroupKey, Wait] | None = None
        for key, group in self._groups.items():
            since_ns = group.pending[0].queued_at_ns if group.urgent is None else group.since_ns(max_delay_ns)
            decision = self._policy.decide(key[2], group.rows, since_ns, now_ns)
            place = (key[0], key[1], group.rank_ns)
            if isinstance(decision, Wait):
                if soonest is None or decision.until_ns < soonest[1].until_ns:
                    soonest = key, decision
            elif best is None or place < best:
                best, chosen = place, (key, decision)
        found = chosen or soonest
        assert found is not None, "a backlog with a size has a group"
        return found

    def _pop(self, key: GroupKey, rows: int, now_ns: int) -> list[Pending]:
        group = self._groups[key]
        if group.urgent is not None:
            return self._pop_pressed(key, group, rows, now_ns)
        before = self._size
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
        if key[0]:
            self._count(key[0], self._size - before)
        return batch

    def _pop_pressed(self, key: GroupKey, group: _Group, rows: int, now_ns: int) -> list[Pending]:
        """As ``_pop``, in the order of the deadlines. What turns out to be late goes behind all others."""
        before = self._size
        batch: list[Pending] = []
        room = rows
        while room > 0 and (group.pending or group.urgent is not None):
            one = group.first
            weight = one.rows or 1
            if one.dead:
                one.bury()
            elif 0 < one.late_ns <= now_ns:
                late = self._groups.setdefault((key[0], True, key[2]), _Group())
                late.pending.append(one)
                late.rows += weight
                self._size += 1
            elif batch and weight > room:
                break
            else:
                batch.append(one)
                room -= weight
            group.pop()
            group.rows -= weight
            self._size -= 1
        if not group.pending and group.urgent is None:
            del self._groups[key]
        if key[0]:
            self._count(key[0], self._size - before)
        return batch

    def _outranks_alone(self, now_ns: int) -> bool:
        """Whether a batch of a higher priority is due than those that must run alone have."""
        if not self._groups:
            return False
        key, decision = self._choose(now_ns)
        return isinstance(decision, Take) and key[0] < min(one.priority for one in self._alone)

    def _pop_alone(self) -> list[Pending]:
        index = 0
        if self._at_level:
            index = min(range(len(self._alone)), key=lambda it: self._alone[it].priority)
        one = self._alone[index]
        del self._alone[index]
        self._size -= 1
        if one.priority:
            self._count(one.priority, -1)
        if one.dead:
            one.bury()
            return []
        return [one]
