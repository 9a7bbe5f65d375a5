"""What waits for a model whose answers leave in the order of its requests. Pure: no clock, no futures of its own."""

from collections import deque
from collections.abc import Iterable, Iterator

from headrace.batching.pending import Pending
from headrace.batching.policy import BatchLimits, Take, Wait, decide


class OrderedBacklog:
    """One line of requests. A batch is what stands at its head, as far as it may share one.

    Nothing overtakes: neither for its priority or deadline, nor because only what stands behind it would still fit.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._waiting: deque[Pending] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Pending]:
        return iter(self._waiting)

    def add(self, pending: Pending) -> None:
        """One more at the end of the line."""
        self._waiting.append(pending)

    def put_back(self, pending: Iterable[Pending]) -> None:
        """Requests that were taken and could not be run, to the front again, in their order."""
        self._waiting.extendleft(reversed(list(pending)))

    def next_batch(self, now_ns: int) -> list[Pending] | Wait | None:
        """The batch to run now, or how long to wait for a better one, or None when nothing is here."""
        self._drop_dead_heads()
        if not self._waiting:
            return None
        decision = self._decide(now_ns)
        return decision if isinstance(decision, Wait) else self._pop(decision.rows)

    def due_ns(self, now_ns: int) -> int:
        """When ``next_batch`` will have one: 0 for now. Only for a backlog that is not empty."""
        decision = self._decide(now_ns)
        return decision.until_ns if isinstance(decision, Wait) else 0

    def drop_dead(self) -> None:
        """Forget every request that nobody waits for."""
        for one in self.clear():
            if one.dead:
                one.bury()
            else:
                self._waiting.append(one)

    def clear(self) -> list[Pending]:
        """Everything, taken out."""
        everything = list(self._waiting)
        self._waiting.clear()
        return everything

    def waiting_at(self, priority: int) -> int:  # noqa: ARG002 - there is one line for all
        """Requests of a level: all, as there are no levels."""
        return len(self._waiting)

    def levels(self) -> dict[int, int]:
        """Requests by level: there are none."""
        return {}

    def rows_before(self, priority: int, rank_ns: int) -> int:  # noqa: ARG002 - nothing overtakes
        """Rows that go before a request which comes now."""
        return sum(one.rows or 1 for one in self._waiting)

    def _decide(self, now_ns: int) -> Take | Wait:
        """For what stands at the head together. Company behind somebody who cannot join is not waited for."""
        first = self._waiting[0]
        most = self._limits.max_rows
        rows = 0
        for one in self._waiting:
            if one is not first and (one.key != first.key or one.alone or first.alone):
                return Take(rows)
            rows += one.rows or 1
            if rows >= most:
                return Take(most)
        return Take(rows) if first.alone else decide(self._limits, rows, first.queued_at_ns, now_ns)

    def _pop(self, rows: int) -> list[Pending]:
        waiting = self._waiting
        first = waiting[0]
        batch: list[Pending] = []
        while waiting:
            one = waiting[0]
            if one.dead:
                one.bury()
            elif batch and (first.alone or one.alone or one.key != first.key or (one.rows or 1) > rows):
                break
            else:
                batch.append(one)
                rows -= one.rows or 1
            waiting.popleft()
            if rows <= 0:
                break
        return batch

    def _drop_dead_heads(self) -> None:
        while self._waiting and self._waiting[0].dead:
            self._waiting.popleft().bury()
