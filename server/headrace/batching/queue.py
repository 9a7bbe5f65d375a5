"""The bounded queue of one model version: requests go in, idle instances take batches out."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic_ns

from headrace.batching.backlog import AnyBacklog, Backlog
from headrace.batching.pending import Pending
from headrace.batching.policy import BatchLimits, Wait
from headrace.core.errors import Kind, Overloaded, of_kind

SWEEP_INTERVAL_NS = 10_000_000


class BatchQueue:
    """The async shell round a ``Backlog``: it only waits and wakes. One event loop owns it.

    With ``preserve_order`` the next batch is handed out when the one before it is finished, so that answers
    leave in the order in which requests came, whatever the number of instances.
    """

    def __init__(
        self,
        model: str,
        limits: BatchLimits,
        max_size: int,
        *,
        preserve_order: bool = False,
        clock: Callable[[], int] = monotonic_ns,
    ) -> None:
        self._model = model
        self._backlog: AnyBacklog = Backlog(limits)
        self._max_size = max_size
        self._preserve_order = preserve_order
        self._clock = clock
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._executing = 0
        self._refusal: tuple[Kind, str] | None = None
        self._swept_ns = -SWEEP_INTERVAL_NS
        self._grown: asyncio.Future[None] | None = None
        self._grown_size = 0
        self._idle_waiters: list[asyncio.Future[None]] = []

    def __len__(self) -> int:
        return len(self._backlog)

    def set_limits(self, limits: BatchLimits, places: int = 1) -> None:  # noqa: ARG002 - places are for sequences
        """What batches may be, once the model file has told; only while the queue is empty."""
        assert not self._backlog, "limits are set before the first request"
        self._backlog = Backlog(limits)

    def for_instance(self, index: int) -> "BatchQueue":  # noqa: ARG002 - which one it is matters to sequences
        """Where an instance of the model takes its batches."""
        return self

    @property
    def executing(self) -> int:
        """Batches that were taken and are not finished."""
        return self._executing

    def put(self, pending: Pending) -> None:
        """Accept one request.

        Raises:
            Overloaded: ``max_size`` requests wait already.
            HeadraceError: the queue refuses everything for now.
        """
        self.make_room()
        self.put_part(pending)

    def put_part(self, pending: Pending) -> None:
        """Accept a part of a request for which ``make_room`` was called; it is not counted against the bound."""
        self._backlog.add(pending)
        if self._waiters:
            self._wake_if_due()
        if self._grown is not None and len(self._backlog) >= self._grown_size:
            if not self._grown.done():
                self._grown.set_result(None)
            self._grown = None

    def make_room(self) -> None:
        """See that one more request fits.

        Raises:
            Overloaded: ``max_size`` requests wait already.
            HeadraceError: the queue refuses everything for now.
        """
        if self._refusal is not None:
            raise of_kind(*self._refusal)
        if len(self._backlog) < self._max_size:
            return
        # Nobody may wait for some of them any more, but to look for those at each refusal would make overload worse.
        now_ns = self._clock()
        if now_ns - self._swept_ns > SWEEP_INTERVAL_NS:
            self._swept_ns = now_ns
            self._backlog.drop_dead()
        if len(self._backlog) >= self._max_size:
            raise Overloaded(f"Exceeds maximum queue size: model '{self._model}' has {self._max_size} requests waiting")

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

    async def grown(self, size: int, timeout_s: float) -> None:
        """Return when ``size`` requests wait, or after ``timeout_s``. One instance at a time is told."""
        if len(self._backlog) >= size:
            return
        grown = self.watch(size)
        await asyncio.wait([grown], timeout=timeout_s)
        if self._grown is grown:
            self._grown = None

    def watch(self, size: int) -> asyncio.Future[None]:
        """A future that is done as soon as ``size`` requests wait; only for a queue of fewer. The last one made counts.

        Whoever waits for it may set it too, and for another reason.
        """
        self._grown_size = size
        self._grown = asyncio.get_running_loop().create_future()
        return self._grown

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
        for pending in batch:
            pending.taken_at_ns = now_ns
        if self._waiters:
            self._wake_if_due()
        return batch

    async def _sleep_until(self, wait: Wait | None) -> None:
        if wait is not None:
            self._wake_at(wait.until_ns)
        else:
            self._notice_idle()
        await self._sleep()

    def finished(self, batch: Sequence[Pending]) -> None:  # noqa: ARG002 - which one it was matters to sequences
        """A batch that was taken is answered, failed or put back."""
        self._executing -= 1
        self._notice_idle()
        if self._preserve_order and self._waiters:
            self._wake_if_due()

    def put_back(self, batch: list[Pending]) -> None:
        """Return requests that were taken and not run; they go first."""
        self._backlog.put_back(batch)
        self._wake_if_due()

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

    def refuse(self, kind: Kind, message: str) -> None:
        """Answer everything that waits, and whatever comes until ``accept``, with this error."""
        self._refusal = (kind, message)
        for pending in self._backlog.clear():
            pending.fail(of_kind(kind, message))
        self._notice_idle()

    def accept(self) -> None:
        """Take requests again."""
        self._refusal = None

    async def drained(self) -> None:
        """Return once nothing waits and nothing executes."""
        while self._backlog or self._executing:
            waiter = asyncio.get_running_loop().create_future()
            self._idle_waiters.append(waiter)
            await waiter

    def nudge(self) -> None:
        """An instance that may have been told of work has gone: tell another."""
        if self._waiters:
            self._wake_if_due()

    def _notice_idle(self) -> None:
        if self._idle_waiters and not self._backlog and not self._executing:
            for waiter in self._idle_waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle_waiters.clear()

    async def _sleep(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            else:
                self._wake()  # it was told of work that it will not do now
            raise

    def _wake_if_due(self) -> None:
        if not self._backlog:
            return
        wait_ns = self._backlog.due_ns(self._clock())
        if wait_ns:
            self._wake_at(wait_ns)
        else:
            self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _wake_at(self, until_ns: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, (until_ns - self._clock()) * 1e-9)
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._wake)
