"""The worker processes of this server: places instances, lends out CPU turns, watches the clock."""

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from time import monotonic, monotonic_ns

from headrace.core.device import CPU, visible_gpus
from headrace.core.process_memory import process_memory
from headrace.log import LogLevels
from headrace.workers.gpu_room import GpuRoom
from headrace.workers.instance import Instance
from headrace.workers.loads import LoadRefused
from headrace.workers.numa import Node, assign
from headrace.workers.placement import Hosting, Needs, NewProcess, PlacementLimits, place
from headrace.workers.process import CallDesk, WorkerProcess
from headrace.workers.rate_limit import RateLimiter
from headrace.workers.resources import Claim, Unschedulable
from headrace.workers.turns import CpuTurns

WATCH_INTERVAL_S = 0.25
HELD_UP_S = 0.5  # a round of the watch that comes so late says nothing of the workers
NO_GPU = Needs(0, shareable=False)
QUIET_NS = 10 * 10**9  # a process of which no model was used for so long has nobody to disturb


class Supervisor:
    """Starts and stops worker processes as instances come and go.

    With ``keeps_shared`` a shared one stays when it hosts nothing: another model is expected, and a start takes longer
    than most loads.
    """

    def __init__(
        self,
        *,
        cpus: Callable[[], int],
        limits: PlacementLimits,
        load_timeout_s: float,
        log_format: str,
        keeps_shared: bool = False,
        nodes: Sequence[Node] = (),
        limiter: RateLimiter | None = None,
        gpus: GpuRoom | None = None,
    ) -> None:
        self.cpus = cpus  # that may be used now: a container's quota can change
        self.turns = CpuTurns(cpus())
        self.limiter = limiter  # None: whoever is idle may run
        self._claims: dict[int, Claim] = {}
        self._gpus = gpus  # None: models may have all of a GPU's memory
        self._gpu_needs: dict[int, Needs] = {}
        self._nodes = nodes
        self._limits = limits
        self._keeps_shared = keeps_shared
        self._load_timeout_s = load_timeout_s
        self._log_format = log_format
        self.desk: CallDesk | None = None  # set before the first process is started
        self._levels: LogLevels | None = None
        self._processes: dict[str, WorkerProcess] = {}
        self._homes: dict[int, WorkerProcess] = {}
        self._names = itertools.count(1)
        self._numbers = itertools.count()
        # More loads at once than CPUs only make each of them slower.
        self._loads = asyncio.Semaphore(max(2, self.turns.cpus))
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
        self.turns.resize(self.cpus())
        try:
            if self.limiter is not None and needs.resources:
                self._limit(self.limiter, instance, Claim(instance.load.name, needs.resources, needs.priority))
            async with self._gpu_room(instance, needs), self._loads:
                process = self._place(needs, instance.load.threads)
                self._homes[number] = process
                await process.load(instance)
        except BaseException:
            await self.stop_instance(instance)
            raise

    def memory_of(self, instance: Instance) -> int:
        """What an instance that is up takes: its process, or what it added to one that it shares."""
        process = self._homes.get(instance.load.instance)
        loaded = instance.loaded
        if process is None or process.pid is None or loaded is None:
            return 0
        memory = None if process.shared else process_memory(process.pid)
        return memory.own_bytes if memory is not None else loaded.memory_bytes

    def expect_leave(self, instance: Instance) -> None:
        """It will be stopped once it has answered what it was given."""
        if self._gpus is not None:
            self._gpus.leaves(instance.load.instance)

    async def stop_instance(self, instance: Instance) -> None:
        """Unload the instance; a process that hosts nothing more is ended."""
        self.turns.resize(self.cpus())
        number = instance.load.instance
        process = self._homes.pop(number, None)
        if process is not None:
            process.unload(instance)
        claim = self._claims.pop(number, None)
        if claim is not None and self.limiter is not None:
            self.limiter.remove(claim)
        if process is not None:
            await self._end_if_empty(process)
        self._gpu_needs.pop(number, None)
        if self._gpus is not None:
            self._gpus.release(number)

    async def close(self) -> None:
        """End every process."""
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*(process.stop() for process in self._processes.values()))
        self._processes.clear()

    async def replace(self, old: WorkerProcess, grace_s: float) -> WorkerProcess:
        """Have a new process take the place of this one: it loads what that hosts, and no request waits or is lost.

        What the old one has been given it answers. What is unanswered after ``grace_s`` seconds, sequences and streams
        for the most part, ends as when a worker dies.

        Raises:
            LoadRefused: a model cannot be loaded in the new one; all is as it was then.
        """
        old.leaving = True
        successor = self._start_process(shared=old.shared, threads=old.threads, device=old.device)
        twins: list[tuple[Instance, Instance]] = []
        try:
            for instance in list(old.hosted.values()):
                if old.hosted.get(instance.load.instance) is instance and not instance.broken:
                    twin = instance.twin(self.number())
                    twins.append((instance, twin))
                    await self._load_twin(instance, twin, successor)
        except BaseException:
            old.leaving = False
            await asyncio.gather(*(self._take_away(twin, grace_s) for _, twin in twins))
            successor.leaving = not successor.hosted  # others may have been placed there meanwhile
            await self._end_if_empty(successor)
            raise
        left = []
        for instance, twin in twins:
            if old.hosted.get(instance.load.instance) is instance:
                instance.replaced_by(twin)
                left.append(instance)
            else:  # it was unloaded meanwhile
                left.append(twin)
        for broken in [one for one in old.hosted.values() if one.broken]:
            successor.take_over(broken, old)
            self._homes[broken.load.instance] = successor
        await asyncio.gather(*(self._take_away(one, grace_s) for one in left))
        old.leaving = not old.hosted  # what was broken may have come up there meanwhile, and stays
        await asyncio.gather(self._end_if_empty(old), self._end_if_empty(successor))
        return successor

    async def _load_twin(self, instance: Instance, twin: Instance, successor: WorkerProcess) -> None:
        claim = self._claims.get(instance.load.instance)
        if self.limiter is not None and claim is not None:
            self._limit(self.limiter, twin, Claim(claim.model, claim.needs, claim.priority))
        self._homes[twin.load.instance] = successor
        needs = self._gpu_needs.get(instance.load.instance, NO_GPU)
        async with self._gpu_room(twin, needs), self._loads:
            await successor.load(twin)
        if twin.broken:
            raise LoadRefused(twin.broken)

    async def _take_away(self, instance: Instance, grace_s: float) -> None:
        """Stop an instance that another stands in for, when it has answered what it was given."""
        try:
            async with asyncio.timeout(grace_s):
                await instance.leave()
        except TimeoutError:
            process = self._homes.get(instance.load.instance)
            if process is not None:
                await process.end(f"it is replaced, and its requests took longer than {grace_s:g} s")
            await instance.leave()
        await self.stop_instance(instance)

    async def _end_if_empty(self, process: WorkerProcess) -> None:
        stays = self._keeps_shared and process.shared and not process.leaving
        if not process.hosted and not stays and self._processes.pop(process.name, None) is not None:
            await process.stop()

    def _gpu_room(self, instance: Instance, needs: Needs) -> AbstractAsyncContextManager[None]:
        """Room on its GPU, where models are bounded there."""
        if self._gpus is None or needs.device == CPU:
            return nullcontext()
        self._gpu_needs[instance.load.instance] = needs
        return self._gpus.loading(instance, needs.device, needs.gpu_bytes)

    def _limit(self, limiter: RateLimiter, instance: Instance, claim: Claim) -> None:
        try:
            limiter.resources.add(claim)
        except Unschedulable as error:
            raise LoadRefused(str(error)) from None
        self._claims[instance.load.instance] = claim
        instance.limit(limiter, claim)

    def _place(self, needs: Needs, threads: int) -> WorkerProcess:
        now_ns = monotonic_ns()
        staying = [one for one in self._processes.values() if not one.leaving]
        hosting = [
            Hosting(
                one.name,
                one.shared,
                len(one.hosted),
                one.device,
                one.is_loading or now_ns - one.used_at_ns < QUIET_NS,
                one.used_at_ns,
            )
            for one in staying
        ]
        where = place(needs, hosting, self._limits)
        if not isinstance(where, NewProcess):
            return self._processes[where]
        return self._start_process(shared=where.shared, threads=1 if where.shared else threads, device=needs.device)

    def _start_process(self, *, shared: bool, threads: int, device: str) -> WorkerProcess:
        try:
            visible = visible_gpus(device, os.environ.get("CUDA_VISIBLE_DEVICES"))
        except ValueError as error:
            raise LoadRefused(str(error)) from None
        name = f"{'shared' if shared else 'worker'}-{next(self._names)}"
        assigned: Counter[int] = Counter()
        for one in self._processes.values():
            if one.node is not None and not one.leaving:
                assigned[one.node.number] += one.threads
        process = WorkerProcess(
            name,
            shared=shared,
            threads=threads,
            log_format=self._log_format,
            desk=self.desk,
            node=assign(threads, self._nodes, assigned),
            device=device,
            visible_gpus=visible,
        )
        if self._levels is not None:
            process.set_logging(self._levels)
        self._processes[name] = process
        return process

    async def _keep_watch(self) -> None:
        passed_over = False
        while True:
            since = monotonic()
            await asyncio.sleep(WATCH_INTERVAL_S)
            now = monotonic()
            # This process was held up itself, as in a container that is paused: so were its workers, or what they have
            # said meanwhile is still to be read. Where every round is late, every other one counts.
            passed_over = now - since > HELD_UP_S and not passed_over
            if passed_over:
                continue
            for process in self._processes.values():
                process.check_time(now, self._load_timeout_s)
