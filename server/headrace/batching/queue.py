"""The bounded queue of one model version: requests go in, idle instances take batches out."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from time import monotonic_ns

from headrace.batching.admission import Admission
from headrace.batching.backlog import AnyBacklog, Backlog
from headrace.batching.curve import LatencyCurves
from headrace.batching.deadlines import Deadlines
from headrace.batching.drain import Drain
from headrace.batching.forecast import Forecast
from headrace.batching.objective import Objective
from headrace.batching.ordered_backlog import OrderedBacklog
from headrace.batching.pending import Pending
from headrace.batching.policy import BatchLimits, Wait
from headrace.batching.sweep import Sweep
from headrace.batching.takers import Takers
from headrace.batching.watchers import Watchers
from headrace.core.errors import Kind, Overloaded, of_kind
from headrace.core.statistics import Statistics
from headrace.core.validation import BatchKey

UNBOUNDED_NS = 1 << 62


class BatchQueue:
    """The async shell round a ``Backlog``: it only waits and wakes. One event loop owns it.

    With ``preserve_order`` the next batch is handed out when the one before it is finished, so that answers
    leave in the order in which requests came, whatever the number of instances.

    ``level_sizes`` are the bounds of priority levels that have one of their own, None where there are no levels:
    ``max_size`` bounds the whole queue then, else each other level. With an ``admission`` requests that cannot be
    answered in time any more are refused; ``deadlines.observe`` is where it learns, None until somebody asks it.

    With ``objective_ns``, 99 in 100 accepted requests are to be answered within so much of their arrival: ``admit``
    refuses what cannot be, and with ``adaptive`` the sizes and delays of batches are chosen for it as well.
    """

    def __init__(
        self,
        model: str,
        limits: BatchLimits,
        max_size: int,
        *,
        preserve_order: bool = False,
        level_sizes: Mapping[int, int] | None = None,
        admission: Admission | None = None,
        objective_ns: int = 0,
        adaptive: bool = False,
        clock: Callable[[], int] = monotonic_ns,
    ) -> None:
        self.curves = LatencyCurves()
        self.objective = Objective(objective_ns, self.curves, adaptive=adaptive) if objective_ns else None
        self.watchers = Watchers()
        self._sweep = Sweep()
        self.deadlines = Deadlines(model, admission, self._sweep, clock)
        self._model = model
        self._preserve_order = preserve_order
        self._backlog: AnyBacklog = self._backlog_for(limits)
        self._level_sizes = level_sizes
        self._max_size = max_size
        self._clock = clock
        self._takers = Takers(clock)
        self._executing = 0
        self._instances = 0
        self._forecast = self.objective.forecast if self.objective is not None else None  # None: nobody has asked
        self._refusal: tuple[Kind, str] | None = None
        self._drain = Drain()
        self._heir: BatchQueue | None = None
        self._heirs_statistics: Statistics | None = None

    def __len__(self) -> int:
        return len(self._backlog)

    def set_limits(self, limits: BatchLimits, places: int = 1) -> None:  # noqa: ARG002 - places are for sequences
        """What batches may be, once the model file has told; only while the queue is empty."""
        assert not self._backlog, "limits are set before the first request"
        self._backlog = self._backlog_for(limits)

    def _backlog_for(self, limits: BatchLimits) -> AnyBacklog:
        self._max_rows = limits.max_rows
        self.deadlines.set_max_rows(limits.max_rows)
        if self._preserve_order:
            return OrderedBacklog(limits)
        return Backlog(limits, self.objective.set_limits(limits) if self.objective is not None else None)

    def for_instance(self, index: int) -> "BatchQueue":  # noqa: ARG002 - which one it is matters to sequences
        """Where an instance of the model takes its batches."""
        return self

    @property
    def executing(self) -> int:
        """Batches that were taken and are not finished."""
        return self._executing

    def levels(self) -> dict[int, int]:
        """Requests that wait, by priority level; empty where there are no levels."""
        return self._backlog.levels()

    # -- requests go in -----------------------------------------------------------------------------------

    def put(self, pending: Pending) -> None:
        """Accept one request.

        Raises:
            Overloaded: ``max_size`` requests wait already.
            HeadraceError: the queue refuses everything for now.
        """
        self.make_room(pending.priority)
        self.put_part(pending)

    def put_part(self, pending: Pending) -> None:
        """Accept a part of a request for which ``make_room`` was called; it is not counted against the bound."""
        if self._heir is not None:
            self._pass_on(self._heir, [pending])
            return
        self._backlog.add(pending)
        if self._takers.sleeping:
            self._wake_if_due()
        if self.watchers.size and len(self._backlog) >= self.watchers.size:
            self.watchers.tell(len(self._backlog))

    def make_room(self, priority: int = 0, deadline_ns: int = 0, rows: int = 1, late_ns: int = 0) -> None:
        """See that one more request fits, and can be answered by its deadline if it has one.

        Raises:
            Overloaded: as many requests wait as may, or it would be answered too late.
            DeadlineExceeded: its time is up already.
            HeadraceError: the queue refuses everything for now.
        """
        if self._refusal is not None:
            raise of_kind(*self._refusal)
        if self._level_sizes is None:
            if len(self._backlog) >= self._max_size:
                self._make_room_among(0, self._max_size)
        else:
            most = self._level_sizes.get(priority, self._max_size)
            if self._backlog.waiting_at(priority) >= most:
                self._make_room_among(priority, most)
        if deadline_ns:
            self.deadlines.check(self._backlog, priority, deadline_ns, rows or 1, late_ns)

    def _make_room_among(self, priority: int, most: int) -> None:
        if self._sweep.due(self._clock()):
            self._backlog.drop_dead()
            if self._backlog.waiting_at(priority) < most:
                return
        of_level = f" of priority {priority}" if priority and self._level_sizes is not None else ""
        raise Overloaded(
            f"Exceeds maximum queue size: model '{self._model}' has {most} requests{of_level} waiting", "queue_full"
        )

    def admit(self, key: BatchKey, rows: int, priority: int) -> None:
        """See that a request can be answered within the model's objective; only for a queue that has one.

        Raises:
            Overloaded: it cannot, as far as can be foreseen.
        """
        objective, backlog = self.objective, self._backlog
        assert objective is not None, "there is nothing to be kept"
        assert isinstance(backlog, Backlog), "sequences have no objective"
        refusal = objective.admit(backlog.ahead(priority), key, rows, self._clock())
        if refusal is not None:
            raise Overloaded(f"model '{self._model}': {refusal.explain(objective.budget.objective_ns)}", "objective")

    # -- what is foreseen ---------------------------------------------------------------------------------

    def forecast(self) -> Forecast:
        """What is foreseen of the instances; from the first call on, they are followed."""
        if self._forecast is None:
            self._forecast = Forecast(self.curves, min(1, self._instances) if self._preserve_order else self._instances)
        return self._forecast

    def finish_ns(self, rows_ahead: int, rows: int, key: BatchKey = None) -> int | None:
        """When ``rows`` more would be answered, by this queue's clock, with ``rows_ahead`` of their key before them.

        None while nothing is known: no batch of such shapes has run, or no instance is up.
        """
        curve = self.curves.of(key)
        if curve is None:
            return None
        size = self._max_rows if self.objective is None else self.objective.policy.size(curve)
        return self.forecast().finish_ns(rows_ahead, rows, self._clock(), size, key)

    def joined(self) -> None:
        """One more instance takes batches here."""
        self._instances += 1
        if self._forecast is not None and not (self._preserve_order and self._instances > 1):
            self._forecast.up()  # where the order is kept one batch runs at a time, as on one instance

    def left(self) -> None:
        """An instance takes no more; if it was told of work, another one is."""
        self._instances -= 1
        if self._forecast is not None and not (self._preserve_order and self._instances):
            self._forecast.down()
        self.nudge()

    def spare_ns(self, now_ns: int) -> int:
        """How much longer those who wait may wait; without an objective, any time."""
        if self.objective is None:
            return UNBOUNDED_NS
        assert isinstance(self._backlog, Backlog), "sequences have no objective"
        oldest = self._backlog.oldest()
        return UNBOUNDED_NS if oldest is None else self.objective.spare_ns(*oldest, now_ns)

    # -- batches come out ---------------------------------------------------------------------------------

    async def take(self) -> list[Pending]:
        """The next batch, as soon as the policy closes one. The caller owes one ``finished`` call for it."""
        while True:
            batch = self._next()
            if isinstance(batch, list):
                return self._taken(batch)
            await self._sleep_until(batch)

    async def ready(self) -> None:
        """Return when the policy would close a batch; whether it still does is for ``take_now`` to say."""
        while True:
            if not (self._preserve_order and self._executing) and self._backlog:
                due_ns = self._backlog.due_ns(self._clock())
                if not due_ns:
                    return
                await self._sleep_until(Wait(due_ns))
            else:
                await self._sleep_until(None)

    @property
    def due(self) -> bool:
        """Whether the policy would close a batch now."""
        if not self._backlog or (self._preserve_order and self._executing):
            return False
        return not self._backlog.due_ns(self._clock())

    async def grown(self, size: int, timeout_s: float) -> None:
        """Return when ``size`` requests wait, or after ``timeout_s``."""
        if len(self._backlog) >= size:
            return
        grown = self.watchers.add(size)
        try:
            await asyncio.wait([grown], timeout=timeout_s)
        finally:
            grown.cancel()  # where it is not done: nobody waits for it any more

    def take_now(self) -> list[Pending]:
        """The next batch if the policy closes one now, else nothing. A batch is owed one ``finished`` call."""
        batch = self._next()
        return self._taken(batch) if isinstance(batch, list) else []

    def _next(self) -> list[Pending] | Wait | None:
        if self._preserve_order and self._executing:
            return None
        return self._backlog.next_batch(self._clock())

    def _taken(self, batch: list[Pending]) -> list[Pending]:
        self._executing += 1
        now_ns = monotonic_ns()
        deadlines = self.deadlines
        if deadlines.observe is not None:
            deadlines.taken_at[now_ns] = len(batch)
        for pending in batch:
            pending.taken_at_ns = now_ns
        if self._forecast is not None:
            self._forecast.taken(batch[0], batch[0].key, sum(one.rows for one in batch), now_ns)
        if self._takers.sleeping:
            self._wake_if_due()
        return batch

    async def _sleep_until(self, wait: Wait | None) -> None:
        if wait is not None:
            self._takers.wake_at(wait.until_ns)
        else:
            self._notice_idle()
        await self._takers.sleep()

    def _wake_if_due(self) -> None:
        if not self._backlog:
            return
        wait_ns = self._backlog.due_ns(self._clock())
        if wait_ns:
            self._takers.wake_at(wait_ns)
        else:
            self._takers.wake()

    def nudge(self) -> None:
        """An instance that may have been told of work has gone: tell another."""
        if self._takers.sleeping:
            self._wake_if_due()

    # -- and come back, or come to an end -----------------------------------------------------------------

    def finished(self, batch: Sequence[Pending]) -> None:
        """A batch that was taken is answered, failed or put back."""
        self._executing -= 1
        deadlines = self.deadlines
        if deadlines.observe is not None:
            deadlines.finished_ns = monotonic_ns()
            if batch:
                deadlines.taken_at.pop(batch[0].taken_at_ns, None)
        if self._forecast is not None and batch:
            self._forecast.ended(batch[0], monotonic_ns())
        self._notice_idle()
        if self._preserve_order and self._takers.sleeping:
            self._wake_if_due()

    def ran(self, batch: Sequence[Pending], rows: int, took_ns: int, now_ns: int) -> None:
        """A batch that was taken has run in ``took_ns``, and is about to be answered."""
        key = batch[0].key
        self.curves.observe(key, rows, took_ns)
        if self.objective is not None:
            earliest_ns = now_ns - self.objective.budget.objective_ns
            late = sum(one.queued_at_ns < earliest_ns for one in batch)
            self.objective.answered(key, len(batch) - late, late)

    def put_back(self, batch: list[Pending]) -> None:
        """Return requests that were taken and not run; they go first. Where everything is refused, so are they."""
        if self._heir is not None:
            self._pass_on(self._heir, batch)
            return
        if self._refusal is not None:
            for pending in batch:
                pending.fail(of_kind(*self._refusal))
            return
        self._backlog.put_back(batch)
        self._wake_if_due()
        if self.watchers.size and len(self._backlog) >= self.watchers.size:
            self.watchers.tell(len(self._backlog))

    async def drained(self) -> None:
        """Return once nothing waits and nothing executes."""
        while self._backlog or self._executing:
            await self._drain.wait()

    def _notice_idle(self) -> None:
        if self._drain.waiting and not self._backlog and not self._executing:
            self._drain.tell()

    # -- when the model cannot serve, or another queue is to ----------------------------------------------

    def refuse(self, kind: Kind, message: str) -> None:
        """Answer everything that waits, and whatever comes until ``accept``, with this error."""
        self._refusal = (kind, message)
        for pending in self._backlog.clear():
            pending.fail(of_kind(kind, message))
        self._notice_idle()

    def accept(self) -> None:
        """Take requests again."""
        self._refusal = None

    def hand_over(self, heir: "BatchQueue", statistics: Statistics) -> None:
        """Have ``heir`` run everything that waits here, and whatever is put or put back here later.

        It is another queue of the same model version, whose instances take what this one's cannot be trusted with;
        ``statistics`` are its own.
        """
        assert heir is not self, "nobody inherits from himself"
        self._heir, self._heirs_statistics = heir, statistics
        self._pass_on(heir, self._backlog.clear())
        self._notice_idle()

    def _pass_on(self, heir: "BatchQueue", batch: list[Pending]) -> None:
        """What was accepted here is not asked there whether it has room. Deaths here are forgotten."""
        for pending in batch:
            pending.deaths = 0
            if pending.statistics is not None:  # a part of a larger request has none
                pending.statistics = self._heirs_statistics
        heir.put_back(batch)

    # -- what matters to the queue of one instance only ---------------------------------------------------

    def lose(self, cause: str) -> None:
        """The worker of the instance that takes here has died: nothing to a model that remembers nothing."""

    def successor(self) -> "BatchQueue":
        """Where another instance takes its batches that is to take the place of one that takes here."""
        return self

    def leave(self) -> None:
        """An instance that takes here is to be replaced: nothing to a model that remembers nothing."""

    @property
    def held(self) -> int:
        """Sequences that the instance that takes here alone can go on with."""
        return 0

    def close(self) -> None:
        """The instance that took here has been replaced."""
