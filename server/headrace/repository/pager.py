"""Keeps the models that are in memory within a limit: those used longest ago go, and come back when they are asked."""

import asyncio
import logging
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from headrace.core.statistics import LATENCY_BUCKETS_S, Histogram
from headrace.repository.residency import AwaitIdle, Evict, Resident, TooLarge, make_room
from headrace.workers.loads import LoadRefused

log = logging.getLogger(__name__)

ROOM_INTERVAL_S = 0.02  # while everything that could go is busy, it is looked at so often
ROOM_TIMEOUT_S = 10.0  # for so long a model waits for others to be idle; its requests are refused then


class Pageable(Protocol):
    """A model version as the pager sees it. Each is one of its own: they are compared by identity."""

    @property
    def label(self) -> str:
        """What the log calls it."""

    @property
    def pinned(self) -> bool:
        """Whether it is never to go."""

    @property
    def busy(self) -> bool:
        """Whether a request waits for it or is under way."""

    @property
    def used_at_ns(self) -> int:
        """When it was used last."""

    def page_out(self) -> asyncio.Task[None]:
        """Leave the memory: from the call on it takes no batch, and the task ends when it has been released.

        It comes back by itself when it is asked for.
        """


@dataclass(slots=True)
class PagerCounts:
    """What has happened so far."""

    page_ins: int = 0
    evictions: int = 0
    page_in_seconds: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS_S))  # request to ready


class Pager:
    """Who is in memory, by ``limit_bytes``. One event loop owns it.

    A model asks for room with ``admit``, says with ``settle`` what it really takes and with ``release`` that it is
    gone. Room is given in the order in which it was asked for, so that a large model is not overtaken for ever.
    """

    def __init__(self, limit_bytes: int, room_timeout_s: float = ROOM_TIMEOUT_S) -> None:
        self.limit_bytes = limit_bytes
        self.counts = PagerCounts()
        self._room_timeout_s = room_timeout_s
        self._residents: dict[Pageable, int] = {}
        self._moving: set[Pageable] = set()  # in or out
        self._line = asyncio.Lock()
        self._trimming: asyncio.Task[None] | None = None

    @property
    def resident_bytes(self) -> int:
        """What those that are in memory, or on their way, take."""
        return sum(self._residents.values())

    @property
    def resident_models(self) -> int:
        """How many those are."""
        return len(self._residents)

    def bytes_of(self, model: Pageable) -> int:
        """What a model takes in memory now; 0 where it is not there."""
        return self._residents.get(model, 0)

    async def admit(self, model: Pageable, expected_bytes: int) -> None:
        """Make room for a model that is about to be loaded, and keep it until ``settle`` or ``release``.

        Raises:
            LoadRefused: it is too large, or all that could make room was busy for too long.
        """
        async with self._line:
            deadline = monotonic() + self._room_timeout_s
            while not await self._make_room(model, expected_bytes):
                if monotonic() > deadline:
                    raise LoadRefused(
                        f"it needs about {expected_bytes} bytes, and for {self._room_timeout_s:g} s the models that "
                        f"could make room were busy; all may have {self.limit_bytes} (--resident-bytes)"
                    )
                await asyncio.sleep(ROOM_INTERVAL_S)
            self._residents[model] = expected_bytes
            self._moving.add(model)

    def settle(self, model: Pageable, measured_bytes: int) -> None:
        """It is loaded, and takes this much.

        Raises:
            LoadRefused: more than there will ever be room for; it is not counted any more.
        """
        self._moving.discard(model)
        self._residents[model] = measured_bytes
        others = [one for one in self._list() if one.key is not model]
        decision = make_room(measured_bytes, others, self.limit_bytes)
        if isinstance(decision, TooLarge):
            self.release(model)
            raise self._too_large(measured_bytes, decision)
        if decision != Evict() and self._trimming is None:
            self._trimming = asyncio.get_running_loop().create_task(self._trim())

    def release(self, model: Pageable) -> None:
        """It is not in memory, whatever it was before."""
        self._moving.discard(model)
        self._residents.pop(model, None)

    def came_in(self, seconds: float) -> None:
        """A model that was away is back, so long after its first request."""
        self.counts.page_ins += 1
        self.counts.page_in_seconds.observe(seconds)

    async def close(self) -> None:
        """Let everything be as it is."""
        if self._trimming is not None:
            self._trimming.cancel()
            await asyncio.wait([self._trimming])

    async def _make_room(self, model: Pageable, needed_bytes: int) -> bool:
        """Whether there is room now; True holds until the next time that anything is awaited."""
        while True:
            decision = make_room(needed_bytes, self._list(), self.limit_bytes)
            if isinstance(decision, TooLarge):
                raise self._too_large(needed_bytes, decision)
            if isinstance(decision, AwaitIdle):
                return False
            if not decision.keys:
                return True
            log.debug("%s needs %d bytes: %d model(s) make room", model.label, needed_bytes, len(decision.keys))
            await self._evict(decision.keys)

    async def _trim(self) -> None:
        """One was larger than expected: get back under the limit, as soon as enough is idle."""
        try:
            while True:
                decision = make_room(0, self._list(), self.limit_bytes)
                if isinstance(decision, Evict):
                    if not decision.keys:
                        return
                    await self._evict(decision.keys)
                else:
                    await asyncio.sleep(ROOM_INTERVAL_S)
        finally:
            self._trimming = None

    async def _evict(self, models: tuple[Pageable, ...]) -> None:
        # All are told before anything is awaited: idle as they are now, none of them has begun a batch since.
        self._moving.update(models)
        self.counts.evictions += len(models)
        leaving = [model.page_out() for model in models]
        await asyncio.wait(leaving)  # unlike gather, it leaves them alone when it is cancelled itself

    def _list(self) -> list[Resident[Pageable]]:
        return [
            Resident(one, nbytes, one.used_at_ns, busy=one in self._moving or one.busy, pinned=one.pinned)
            for one, nbytes in self._residents.items()
        ]

    def _too_large(self, needed_bytes: int, decision: TooLarge) -> LoadRefused:
        beside = f" beside the {decision.pinned_bytes} bytes of pinned models" if decision.pinned_bytes else ""
        return LoadRefused(
            f"it needs about {needed_bytes} bytes, more than --resident-bytes {self.limit_bytes} has room for{beside}"
        )
