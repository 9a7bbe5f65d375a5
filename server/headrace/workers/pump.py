"""How an instance takes its batches: it waits for a free slot, for company or for its turn, and takes the next one."""

import asyncio
import errno
import logging
from collections.abc import Callable
from time import monotonic_ns

from headrace.batching.forecast import Place
from headrace.batching.pending import Pending
from headrace.batching.queue import BatchQueue
from headrace.batching.regroup import Regroup
from headrace.batching.staging import Staging
from headrace.core.errors import HeadraceError, InternalError, Overloaded
from headrace.workers.frames import Loaded
from headrace.workers.open_streams import MAX_OPEN, OpenStreams
from headrace.workers.permit import Permit
from headrace.workers.slots import Slot, Slots

log = logging.getLogger(__name__)

HANDOVER_NS = 500_000  # before a worker is expected to be free it is given its next batch, under an objective
_SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))  # of descriptors and of memory


class Pump:
    """Runs while the instance's worker is up, on the event loop. ``send`` hands a batch over with the slot for it.

    Here is also what it decides by: the ``slots`` of the present worker, the requests ``in_flight`` to it, its
    ``place`` in the forecast and whom it waits for to ``regroup``. The instance keeps these true as batches come back.
    """

    def __init__(
        self,
        model: str,
        queue: BatchQueue,
        permit: Permit,
        streams: OpenStreams,
        send: Callable[[Slot, list[Pending]], None],
        *,
        of_sequences: bool,
    ) -> None:
        self.slots = Slots(self.wake)  # of the present worker
        self.in_flight = 0  # requests that the worker has
        self.place = Place()  # its batches, for as long as an objective needs them to be foreseen
        self.regroup = Regroup()
        self._model = model
        self._of_sequences = of_sequences  # which are never staged
        self._queue = queue
        self._permit = permit
        self._streams = streams
        self._send = send
        self._freed: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether batches are taken."""
        return self._task is not None

    def start(self, loaded: Loaded) -> asyncio.Task[None]:
        """Begin to take batches; the task ends by itself only where there is a bug."""
        self._task = asyncio.get_running_loop().create_task(self._run(loaded))
        self._queue.joined()
        return self._task

    def stop(self) -> None:
        """Take no more batches."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
            self._permit.leave_line()
            self._queue.left()

    def lose(self) -> None:
        """The worker has died, with everything that it had."""
        self.in_flight = 0
        self.place = Place()
        self._permit.give()

    def let_go(self) -> None:
        """Use nothing any more of the memory that the worker had: it is gone, or there is another."""
        self.slots = Slots(self.wake)

    def wake(self) -> None:
        """What it waits for may be there: a slot, or the end of a batch or a stream."""
        if self._freed is not None and not self._freed.done():
            self._freed.set_result(None)

    # -- what comes back ----------------------------------------------------------------------------------

    def batch_ended(self, pending: list[Pending]) -> None:
        """A batch is answered, failed or put back, and its slot is free."""
        self._queue.finished(pending)
        self.end_turn_if_idle()

    def stream_ended(self, pending: Pending) -> None:
        """A request that was answered part by part is done with."""
        self.in_flight -= 1
        if self._permit.limited:
            self.end_turn_if_idle()
        self.wake()
        self._queue.finished([pending])

    def end_turn_if_idle(self) -> None:
        """Let others have their turn where the worker has no batch now."""
        if self._permit.held and self.slots.idle:
            self._permit.give(keep_claim=bool(len(self._streams)), again=self._goes_on())

    def _goes_on(self) -> bool:
        """Whether it will want another turn as soon as it comes to that."""
        if self._task is None or not self._queue.due or self.regroup.wait_ns(len(self._queue), monotonic_ns()):
            return False
        return len(self._streams) < (1 if self._permit.limited else MAX_OPEN)

    # -- what is taken ------------------------------------------------------------------------------------

    async def _run(self, loaded: Loaded) -> None:
        threads = loaded.cpu_threads
        in_turn = threads > 0 or self._permit.limited
        staging = Staging() if self._stages(loaded, in_turn) else None
        most = max(1, loaded.signature.max_batch_size)
        while True:
            if not self.slots.available or len(self._streams) >= MAX_OPEN:
                await self._free_slot()
                continue
            if staging is not None and not self.slots.idle:
                wanted = staging.wanted(self.in_flight + len(self._queue), most)
                if len(self._queue) < wanted:
                    await self._company(wanted)
                    continue
            if self.place and not in_turn and (early_ns := self._early_ns(monotonic_ns())) > 0:
                await self._free_slot(early_ns * 1e-9)
                continue
            pending = await (self._take_in_turn(threads) if in_turn else self._queue.take())
            if not pending:
                continue
            slot = self.slots.take()
            try:
                self._send(slot, pending)
            except Exception as error:
                log.exception("could not hand a batch of model %s to its worker", self._model)
                for one in pending:
                    one.fail(self._not_handed_over(error))
                self.slots.give(slot)
                self.batch_ended(pending)
            del pending, slot  # the next wait may be long, and they hold memory that somebody has lent

    def _not_handed_over(self, error: Exception) -> HeadraceError:
        """What those of a batch are told; the system may have room for them a moment later."""
        what = f"model '{self._model}': could not hand the request over: {error}"
        short = isinstance(error, OSError) and error.errno in _SHORTAGES
        return Overloaded(what) if short else InternalError(what)

    async def _take_in_turn(self, threads: int) -> list[Pending]:
        """The next batch of a heavy or limited model, once it may run. None may be left when its turn comes.

        Nothing is staged: the handing over takes little beside the batch, and what waits longer grows together.
        """
        if not self.slots.idle or (self._permit.limited and len(self._streams)):
            await self._free_slot()
            return []
        if not self._queue.due:
            self._permit.leave_line()  # others may have taken what it stood in line for
            await self._queue.ready()
        while wait_ns := self._regroup_ns(monotonic_ns()):
            self._permit.leave_line()
            await self._queue.grown(self.regroup.expected, wait_ns * 1e-9)
        if self._permit.limited and self._permit.ask():
            self._queue.nudge()  # this one alone was told of what waits
        await self._permit.take(threads)
        pending = self._queue.take_now()
        if not pending:
            self._permit.give(ran=False)
        return pending

    def _regroup_ns(self, now_ns: int) -> int:
        """How much longer to wait for the clients of the last batch; those who are here may not be late by it."""
        wait_ns = self.regroup.wait_ns(len(self._queue), now_ns)
        return min(wait_ns, self._queue.spare_ns(now_ns)) if wait_ns else 0

    def _stages(self, loaded: Loaded, in_turn: bool) -> bool:
        """Whether a batch waits at the worker behind the one that runs, with half of all clients in it."""
        alone = in_turn or loaded.signature.decoupled or self._of_sequences
        return not alone and self._queue.objective is None

    def _early_ns(self, now_ns: int) -> int:
        """How much too early it would be to stage a batch behind the one that runs; only under an objective.

        Nobody can join a batch that is staged, so it is taken when the worker is about to be free.
        """
        return int(self.place.free_ns(now_ns)) - now_ns - HANDOVER_NS

    async def _company(self, wanted: int) -> None:
        """Return when so many requests wait, or when the batch in flight has ended."""
        self._freed = self._queue.watchers.add(wanted)
        await self._freed

    async def _free_slot(self, timeout_s: float | None = None) -> None:
        """Return when a batch in flight has ended, or a stream, or after ``timeout_s``."""
        self._freed = asyncio.get_running_loop().create_future()
        if timeout_s is None:
            await self._freed
        else:
            await asyncio.wait([self._freed], timeout=timeout_s)
