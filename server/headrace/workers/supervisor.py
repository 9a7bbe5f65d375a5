"""The worker processes of this server: places instances, lends out CPU turns, watches the clock."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

from headrace.log import LogLevels
from headrace.workers.instance import Instance
from headrace.workers.placement import Hosting, NewProcess, PlacementLimits, place
from headrace.workers.process import CallDesk, WorkerProcess
from headrace.workers.turns import CpuTurns

WATCH_INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True)
class Needs:
    """What placement has to know of an instance beside its Load frame."""

    file_bytes: int
    shareable: bool


class Supervisor:
    """Starts and stops worker processes as instances come and go."""

    def __init__(self, *, cpus: int, limits: PlacementLimits, load_timeout_s: float, log_format: str) -> None:
        self.turns = CpuTurns(cpus)
        self._limits = limits
        self._load_timeout_s = load_timeout_s
        self._log_format = log_format
        self.desk: CallDesk | None = None  # set before the first process is started
        self._levels: LogLevels | None = None
        self._processes: dict[str, WorkerProcess] = {}
        self._homes: dict[int, WorkerProcess] = {}
        self._names = itertools.count(1)
        self._numbers = itertools.count()
        # More loads at once than CPUs only make each of them slower.
        self._loads = asyncio.Semaphore(max(2, cpus))
        self._watch: asyncio.Task[None] | None = None

    @property
    def processes(self) -> Sequence[WorkerProcess]:
        """Every worker process, also one that is coming back."""
        return list(self._processes.values())

    def start(self) -> None:
        """Begin to watch over the processes."""
        self._watch = asyncio.get_running_loop().create_task(self._keep_watch())

    def set_logging(self, levels: LogLevels) -> None:
        """Have every worker log so from now on, those that are started later too."""
        self._levels = levels
        for process in self._processes.values():
            process.set_logging(levels)

    def number(self) -> int:
        """A number for a new instance, unique in this server."""
        return next(self._numbers)

    async def start_instance(self, instance: Instance, needs: Needs) -> None:
        """Place the instance, load its model; returns once it takes batches.

        Raises:
            LoadRefused: with the reason, for the model's owner.
        """
        number = instance.load.instance
        try:
            async with self._loads:
                process = self._place(needs, instance.load.threads)
                self._homes[number] = process
                await process.load(instance)
        except BaseException:
            await self.stop_instance(instance)
            raise

    async def stop_instance(self, instance: Instance) -> None:
        """Unload the instance; a process that hosts nothing more is ended."""
        number = instance.load.instance
        process = self._homes.pop(number, None)
        if process is None:
            return
        process.unload(instance)
        if not process.hosted:
            self._processes.pop(process.name, None)
            await process.stop()

    async def close(self) -> None:
        """End every process."""
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*(process.stop() for process in self._processes.values()))
        self._processes.clear()

    def _place(self, needs: Needs, threads: int) -> WorkerProcess:
        hosting = [Hosting(one.name, one.shared, len(one.hosted)) for one in self._processes.values()]
        where = place(needs.shareable, needs.file_bytes, hosting, self._limits)
        if not isinstance(where, NewProcess):
            return self._processes[where]
        name = f"{'shared' if where.shared else 'worker'}-{next(self._names)}"
        process = WorkerProcess(
            name,
            shared=where.shared,
            threads=1 if where.shared else threads,
            log_format=self._log_format,
            desk=self.desk,
        )
        if self._levels is not None:
            process.set_logging(self._levels)
        self._processes[name] = process
        return process

    async def _keep_watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            now = monotonic()
            for process in self._processes.values():
                process.check_time(now, self._load_timeout_s)
