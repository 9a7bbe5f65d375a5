"""One model version's place in memory, where that has a limit: it leaves when it is told to, and comes when asked for.

While it is away it has no instances. A stand-in waits at its queue then, as an idle instance would, so that nothing on
the way of a request has to ask where the model is.
"""

import asyncio
import logging
from collections.abc import Sequence
from time import monotonic, monotonic_ns
from typing import Protocol

from headrace.batching.queue import BatchQueue
from headrace.batching.sequence_queue import SequenceQueue
from headrace.core.errors import Kind
from headrace.repository.pager import Pager
from headrace.workers.instance import Instance
from headrace.workers.loads import LoadRefused

log = logging.getLogger(__name__)

STAND_IN_S = 3600.0  # a stand-in looks up so often, for no reason but that every wait has an end
COME_AGAIN_S = 5.0  # after it could not come; requests are refused meanwhile


class Occupant(Protocol):
    """What comes and goes."""

    queue: BatchQueue | SequenceQueue
    instances: list[Instance]

    @property
    def label(self) -> str:
        """What the log calls it."""

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def pinned(self) -> bool:
        """Whether it is never to go."""

    @property
    def estimated_bytes(self) -> int:
        """What it takes at least, before anybody knows more."""

    async def start_instances(self) -> None:
        """Load every instance; raises LoadRefused, with none left running."""

    async def stop_instances(self) -> None:
        """Stop every instance, when it has answered what it has taken; there are none then."""

    def measured_bytes(self) -> int:
        """What its instances take, which are up."""

    def distrust(self, reason: str) -> bool:
        """It could not come: whether another form takes its place, and answers what waits."""


class Residence:
    """To the pager it is the model. ``unready`` is why it could not come, empty where it may."""

    def __init__(self, occupant: Occupant, pager: Pager) -> None:
        self.nbytes = 0  # that it took when it was loaded last
        self.unready = ""
        self._occupant = occupant
        self._pager = pager
        self._used_at_ns = 0
        self._stand_in: asyncio.Task[None] | None = None
        self._moving = asyncio.Lock()  # while it goes or comes

    @property
    def is_away(self) -> bool:
        """Whether a stand-in waits in its place, or brings it in."""
        return self._stand_in is not None

    async def come(self) -> None:
        """Have every instance loaded, in memory for which there is room.

        Raises:
            LoadRefused: there is no room, or one of them was refused; none is left running then.
        """
        occupant = self._occupant
        async with self._moving:
            await self._pager.admit(self, self.nbytes or occupant.estimated_bytes)
            try:
                await occupant.start_instances()
                self.nbytes = occupant.measured_bytes()
                self._used_at_ns = monotonic_ns()
                self._pager.settle(self, self.nbytes)
            except BaseException:
                await occupant.stop_instances()
                self._pager.release(self)
                raise

    async def close(self) -> None:
        """Leave for good; nothing waits for it any more."""
        if self._stand_in is not None:
            self._stand_in.cancel()
            await asyncio.wait([self._stand_in])
        await self._leave()

    # -- what the pager asks ------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """What the log calls it."""
        return self._occupant.label

    @property
    def pinned(self) -> bool:
        """Whether it is never to go."""
        return self._occupant.pinned

    @property
    def busy(self) -> bool:
        """Whether a request waits for it or is under way."""
        return bool(len(self._occupant.queue) or self._occupant.queue.executing)

    @property
    def used_at_ns(self) -> int:
        """When it was used last, or loaded."""
        return max(self._used_at_ns, _used_last(self._occupant.instances))

    def page_out(self) -> asyncio.Task[None]:
        """Leave the memory: from the call on it takes no batch; the task ends when its workers are free of it.

        A request brings it in again.
        """
        assert not self.busy, "what is in use stays"
        self._used_at_ns = self.used_at_ns
        for instance in self._occupant.instances:
            instance.stop()
        loop = asyncio.get_running_loop()
        leaving = loop.create_task(self._leave())
        self._stand_in = loop.create_task(self._wait_for_request(leaving))
        self._stand_in.add_done_callback(self._on_stand_in_end)
        return leaving

    # -- the stand-in -------------------------------------------------------------------------------------

    async def _leave(self) -> None:
        async with self._moving:
            await self._occupant.stop_instances()
            self._pager.release(self)
            log.debug("%s has left the memory", self.label)

    async def _wait_for_request(self, leaving: asyncio.Task[None]) -> None:
        """Have the model come when there is something to do."""
        await asyncio.wait([leaving])
        queue = self._occupant.queue
        assert isinstance(queue, BatchQueue), "a stateful model is pinned"
        while True:
            while not len(queue):
                await queue.grown(1, STAND_IN_S)
            started = monotonic()
            try:
                await self.come()
            except LoadRefused as error:
                if self._occupant.distrust(str(error)):
                    return
                self._refuse(f"it cannot be brought into memory: {error}")
                await asyncio.sleep(COME_AGAIN_S)
                self.unready = ""
                queue.accept()
            else:
                self._stand_in = None
                seconds = monotonic() - started
                self._pager.came_in(seconds)
                log.debug("%s has come into memory, in %.3f s", self.label, seconds)
                return

    def _refuse(self, reason: str) -> None:
        log.error("%s: %s", self.label, reason)
        self.unready = reason
        self._occupant.queue.refuse(Kind.NOT_READY, f"model '{self._occupant.name}' is not at ready state: {reason}")

    def _on_stand_in_end(self, task: asyncio.Task[None]) -> None:
        """A bug must not leave requests waiting for ever."""
        if not task.cancelled() and task.exception() is not None:
            log.critical("%s cannot come any more", self.label, exc_info=task.exception())
            self._refuse("it cannot be brought into memory any more; the server's log says why")


def _used_last(instances: Sequence[Instance]) -> int:
    return max((one.used_at_ns for one in instances), default=0)
