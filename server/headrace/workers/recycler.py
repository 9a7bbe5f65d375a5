"""Watches over the memory of the workers, and has one replaced that has grown too much."""

import asyncio
import logging
from collections.abc import Iterator
from time import monotonic

from headrace.core.process_memory import process_memory
from headrace.workers.growth import GiveUp, GrowthLimits, MemorySample, MemoryWatch, Recycle
from headrace.workers.loads import LoadRefused
from headrace.workers.supervisor import Supervisor

log = logging.getLogger(__name__)

SAMPLE_S = 2.0  # as a rule; shorter where workers may be replaced more often than once in 20 s


class Recycler:
    """The shell round ``MemoryWatch``: it samples, and carries out one verdict after the other."""

    def __init__(self, supervisor: Supervisor, limits: GrowthLimits, grace_s: float) -> None:
        self.recycles: dict[str, int] = {"growth": 0, "limit": 0}  # that have come to a good end
        self._supervisor = supervisor
        self._watch = MemoryWatch(limits)
        self._grace_s = grace_s
        self._sample_s = min(SAMPLE_S, limits.interval_s / 10)

    async def run(self) -> None:
        """Watch, until cancelled. What is being replaced then is for the supervisor's ``close``."""
        while True:
            await asyncio.sleep(self._sample_s)
            verdict = self._watch.observe(self._samples(), monotonic())
            if isinstance(verdict, Recycle):
                await self._carry_out(verdict)
            elif verdict is not None:
                self._give_up(verdict)

    def _samples(self) -> Iterator[MemorySample]:
        """All workers; at rest are those that could be replaced: that are not loading, coming back or about to go."""
        for process in self._supervisor.processes:
            pid = process.pid
            memory = process_memory(pid) if pid is not None else None
            limits = [one.memory_limit_bytes for one in process.hosted.values() if one.memory_limit_bytes]
            yield MemorySample(
                process.name,
                (pid, frozenset(process.hosted)),
                memory.own_bytes if memory is not None else 0,
                process.batches,
                min(limits, default=0),
                at_rest=memory is not None and bool(process.hosted) and not (process.is_loading or process.leaving),
            )

    async def _carry_out(self, verdict: Recycle) -> None:
        old = next(one for one in self._supervisor.processes if one.name == verdict.worker)
        models = sorted({instance.load.name for instance in old.hosted.values()})
        named = f"{', '.join(models[:3])}{' ...' if len(models) > 3 else ''}"
        log.warning("worker %s (%s) is replaced: %s", old.name, named, verdict.why)
        started = monotonic()
        try:
            successor = await self._supervisor.replace(old, self._grace_s)
        except LoadRefused as error:
            self._fail(verdict, f"a model could not be loaded in another worker: {error}")
        except Exception as error:  # whatever it was, the old worker serves, and the others are to be watched
            log.exception("worker %s could not be replaced", old.name)
            self._fail(verdict, str(error))
        else:
            self.recycles[verdict.reason] += 1
            self._watch.replaced(verdict.worker, successor.name, monotonic())
            log.info("worker %s has taken the place of %s in %.1f s", successor.name, old.name, monotonic() - started)

    def _fail(self, verdict: Recycle, why: str) -> None:
        gave_up = self._watch.failed(verdict.worker, why, monotonic())
        if gave_up is not None:
            self._give_up(gave_up)

    @staticmethod
    def _give_up(verdict: GiveUp) -> None:
        log.error("worker %s is not replaced any more for now: %s", verdict.worker, verdict.why)
