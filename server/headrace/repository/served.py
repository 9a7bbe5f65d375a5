"""One version of a model while it is served: its instances, its queue, and what clients may ask about it.

Under a limit of memory (``pager``) it may be away: known, ready and without instances. A stand-in waits at its queue
then, as an idle instance would, and brings it in.
"""

import asyncio
import logging
from time import monotonic, monotonic_ns

from headrace.batching.policy import BatchLimits
from headrace.batching.queue import BatchQueue
from headrace.batching.sequence_queue import SequenceQueue
from headrace.core.errors import InvalidRequest, Kind
from headrace.core.model import ModelInfo, Signature
from headrace.core.request import Parameters
from headrace.core.statistics import Statistics
from headrace.core.validation import InputChecker
from headrace.repository.declared import config_json, declared_signature, reshapes
from headrace.repository.layout import ModelFolder, VersionFiles
from headrace.repository.pager import Pager
from headrace.workers.cpus import threads_for
from headrace.workers.frames import Load, Loaded
from headrace.workers.instance import Instance
from headrace.workers.placement import Needs
from headrace.workers.process import LoadRefused
from headrace.workers.supervisor import Supervisor
from headrace_backends.registry import PLATFORMS, SHAREABLE

log = logging.getLogger(__name__)

WORKER_BYTES = 64 << 20  # about what a process of its own takes beside the model
STAND_IN_S = 3600.0  # a stand-in looks up so often, for no reason but that every wait has an end
PAGE_IN_AGAIN_S = 5.0  # after one that failed; requests are refused meanwhile


class ServedVersion:
    """Made for a version that is to be loaded; usable once ``start`` has returned, until ``drain`` is called."""

    def __init__(
        self,
        folder: ModelFolder,
        files: VersionFiles,
        supervisor: Supervisor,
        *,
        with_summaries: bool = False,
        pager: Pager | None = None,
    ) -> None:
        self.folder = folder
        self.files = files
        self.version = str(files.version)
        self.print = version_print(folder, files.version)
        self.statistics = Statistics(with_summaries=with_summaries)
        self.instances: list[Instance] = []
        # What every request asks for, as plain attributes.
        batching = folder.config.batching
        self.default_timeout_us = batching.default_timeout_us  # for requests that bring no timeout; 0 is none
        self.default_priority = (batching.priority_levels + 1) // 2  # the middle of the levels
        self.max_batch_size = 0  # rows in one execution; 0 where requests are never merged
        self.decoupled = False  # whether a request is answered with any number of responses
        self.cached = folder.config.response_cache
        self._priority_levels = batching.priority_levels
        self._supervisor = supervisor
        self._pager = pager
        self._bytes = 0  # that it took when it was loaded last
        self._loaded: Loaded | None = None  # at first
        self._used_at_ns = 0
        self._stand_in: asyncio.Task[None] | None = None
        self._moving = asyncio.Lock()  # while it goes out or comes in
        self._unready = ""  # why it could not be brought in
        # Filled by start, when the model file has told what it takes.
        self.info: ModelInfo
        self.checker: InputChecker
        self.queue: BatchQueue | SequenceQueue

    @property
    def ready(self) -> bool:
        """Whether an instance is up, or will be for a request; false while all workers are being started again."""
        if self._stand_in is not None:
            return not self._unready
        return any(instance.is_up for instance in self.instances)

    @property
    def broken(self) -> bool:
        """Whether no instance can come back by itself."""
        return bool(self.instances) and all(instance.broken for instance in self.instances)

    @property
    def why_unready(self) -> str:
        """Why it is not ready."""
        return self._unready or next((one.broken for one in self.instances if one.broken), "its worker is restarting")

    @property
    def notes(self) -> tuple[str, ...]:
        """What the backend decided by itself."""
        return self._loaded.notes if self._loaded is not None else ()

    @property
    def resident(self) -> bool:
        """Whether it is in memory, in its workers' at least."""
        return self._stand_in is None

    @property
    def memory_bytes(self) -> int:
        """What it took in memory when it was loaded last: its workers', or its share of theirs."""
        return self._bytes

    def priority(self, parameters: Parameters) -> int:
        """The request's level: 1 is served first; 0 or none asks for the default."""
        levels = self._priority_levels
        wanted = parameters.get("priority", 0)
        if not levels or not wanted:
            return self.default_priority
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 < wanted <= levels:
            raise InvalidRequest(
                f"model '{self.folder.name}': parameter 'priority' is {wanted!r}, expected 1 (served first) to {levels}"
            )
        return wanted

    async def start(self) -> None:
        """Load every instance.

        Raises:
            LoadRefused: one of them was refused; none is left running then.
        """
        started = monotonic()
        self._queue_until_known()
        await self._bring_in()
        self.statistics.load_seconds = monotonic() - started

    async def drain(self) -> None:
        """Answer what was accepted, then stop the instances. Nobody may put requests into the queue any more."""
        await self.queue.drained()
        if self._stand_in is not None:
            self._stand_in.cancel()
            await asyncio.wait([self._stand_in])
        async with self._moving:
            await self._stop_instances()
            if self._pager is not None:
                self._pager.release(self)

    # -- what the pager asks ------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """What the log calls it."""
        return f"model {self.folder.name} version {self.version}"

    @property
    def pinned(self) -> bool:
        """Whether it stays in memory. The states of sequences are in the worker, so a stateful model does."""
        return self.folder.config.residency.pinned or self.folder.sequence is not None

    @property
    def busy(self) -> bool:
        """Whether a request waits for it or is under way."""
        return bool(len(self.queue) or self.queue.executing)

    @property
    def used_at_ns(self) -> int:
        """When it was used last, or loaded."""
        return max(self._used_at_ns, *(one.used_at_ns for one in self.instances), 0)

    def page_out(self) -> asyncio.Task[None]:
        """Leave the memory: from the call on it takes no batch; the task ends when its workers are free of it.

        A request brings it in again.
        """
        assert not self.busy, "what is in use stays"
        self._used_at_ns = self.used_at_ns
        for instance in self.instances:
            instance.stop()
        loop = asyncio.get_running_loop()
        leaving = loop.create_task(self._leave())
        self._stand_in = loop.create_task(self._wait_for_request(leaving))
        self._stand_in.add_done_callback(self._on_stand_in_end)
        return leaving

    def _on_stand_in_end(self, task: asyncio.Task[None]) -> None:
        """A bug must not leave requests waiting for ever."""
        if not task.cancelled() and task.exception() is not None:
            log.critical("%s cannot be brought in any more", self.label, exc_info=task.exception())
            self._unready = "it cannot be brought into memory any more; the server's log says why"
            self.queue.refuse(Kind.NOT_READY, f"model '{self.folder.name}' is not at ready state: {self._unready}")

    async def _leave(self) -> None:
        async with self._moving:
            await self._stop_instances()
            self.instances = []
            assert self._pager is not None, "nobody else pages out"
            self._pager.release(self)
            log.debug("%s is paged out", self.label)

    async def _wait_for_request(self, leaving: asyncio.Task[None]) -> None:
        """Stand in for the instances while there are none, and bring them in when there is something to do."""
        await asyncio.wait([leaving])
        assert self._pager is not None, "without one nothing is paged out"
        queue = self.queue
        assert isinstance(queue, BatchQueue), "a stateful model is not paged out"
        while True:
            while not len(queue):
                await queue.grown(1, STAND_IN_S)
            started = monotonic()
            try:
                async with self._moving:
                    await self._bring_in()
            except LoadRefused as error:
                self._unready = f"it cannot be brought into memory: {error}"
                log.error("%s: %s", self.label, self._unready)  # noqa: TRY400 - the reason is the model's owner's
                queue.refuse(Kind.NOT_READY, f"model '{self.folder.name}' is not at ready state: {self._unready}")
                await asyncio.sleep(PAGE_IN_AGAIN_S)
                self._unready = ""
                queue.accept()
            else:
                self._stand_in = None
                seconds = monotonic() - started
                self._pager.came_in(seconds)
                log.debug("%s is paged in, in %.3f s", self.label, seconds)
                return

    # -- coming and going ---------------------------------------------------------------------------------

    async def _bring_in(self) -> None:
        """Have every instance loaded, in memory for which there is room.

        Raises:
            LoadRefused: one of them was refused; none is left running then.
        """
        if self._pager is None:
            await self._start_instances()
            return
        await self._pager.admit(self, self._bytes or self._estimate())
        try:
            await self._start_instances()
            self._bytes = max(self.files.model_bytes, sum(map(self._supervisor.memory_of, self.instances)))
            self._used_at_ns = monotonic_ns()
            self._pager.settle(self, self._bytes)
        except BaseException:
            await self._stop_instances()
            self.instances = []
            self._pager.release(self)
            raise

    def _estimate(self) -> int:
        """What it may take, before anybody knows."""
        count = sum(group.count for group in self.folder.config.instances)
        return count * (self.files.model_bytes + (0 if self._needs.shareable else WORKER_BYTES))

    @property
    def _needs(self) -> Needs:
        # What is bounded by itself must be measured by itself.
        shareable = self.files.backend in SHAREABLE and not self.folder.config.memory_limit_bytes
        pages = self._pager is not None and not self.pinned
        return Needs(self.files.model_bytes, shareable, pages=pages, again=self._loaded is not None)

    async def _start_instances(self) -> None:
        queue = self.queue
        timeout_s = self.folder.config.execution_timeout_s
        self.instances = [
            Instance(load, queue.for_instance(index), self.statistics, self._supervisor.turns, timeout_s)
            for index, load in enumerate(self._loads())
        ]
        limit_bytes = self.folder.config.memory_limit_bytes
        for instance in self.instances:
            instance.memory_limit_bytes = limit_bytes
            instance.on_replaced = self._on_replaced
            instance.loaded = self._loaded  # so that it breaks where the files have changed since the first time
        needs = self._needs
        starts = [self._supervisor.start_instance(instance, needs) for instance in self.instances]
        results = await asyncio.gather(*starts, return_exceptions=True)
        refused = [result for result in results if isinstance(result, BaseException)]
        refused += [LoadRefused(one.broken) for one in self.instances if one.broken]
        if refused:
            await self._stop_instances()
            raise refused[0]
        if self._loaded is None:
            self._loaded = self.instances[0].loaded
            self._describe(self.instances[0].signature)
        for instance in self.instances:
            instance.on_change = self._on_instance_change

    def _queue_until_known(self) -> None:
        batching, name, spec = self.folder.config.batching, self.folder.name, self.folder.sequence
        order = batching.preserve_order
        if spec is None:
            self.queue = BatchQueue(name, BatchLimits(), batching.max_queue_size, preserve_order=order)
        else:
            self.queue = SequenceQueue(name, spec, batching.max_queue_size, preserve_order=order)

    def _describe(self, signature: Signature) -> None:
        batching = self.folder.config.batching
        # A decoupled model is given one request at a time: whoever is answered part by part has nobody to wait for.
        most = 1 if signature.decoupled else max(1, signature.max_batch_size)
        self.queue.set_limits(
            BatchLimits(
                max_rows=most,
                preferred_rows=tuple(size for size in batching.preferred_sizes if size <= signature.max_batch_size),
                max_delay_ns=batching.max_queue_delay_us * 1000 if signature.max_batch_size else 0,
            ),
            places=max(1, signature.max_batch_size),
        )
        self.checker = InputChecker(self.folder.name, signature)
        self.max_batch_size = signature.max_batch_size
        self.decoupled = signature.decoupled
        self.info = ModelInfo(
            name=self.folder.name,
            version=self.version,
            platform=PLATFORMS.get(self.files.backend, self.files.backend),
            backend=self.files.backend,
            signature=signature,
            labels=dict(self.folder.labels),
        )

    def _loads(self) -> list[Load]:
        config = self.folder.config
        wanted = config.parameters.get("intra_op_threads")
        groups = [(group.device, group.count) for group in config.instances]
        total = sum(count for _, count in groups)
        threads = threads_for(
            self._supervisor.cpus(),
            total,
            wanted if isinstance(wanted, int) and not isinstance(wanted, bool) else None,
        )
        declared = declared_signature(self.folder)
        return [
            Load(
                instance=self._supervisor.number(),
                backend=self.files.backend,
                name=self.folder.name,
                version=self.version,
                path=str(self.files.model_path),
                device=device,
                threads=threads,
                signature=declared,
                max_batch_size=config.max_batch_size,
                parameters=dict(config.parameters),
                warmup=config.warmup,
                decoupled=config.decoupled,
                sequence=self.folder.sequence,
                reshapes=reshapes(self.folder),
                config_json=config_json(self.folder, self.files.version),
                repository=str(self.folder.path),
            )
            for device, count in groups
            for _ in range(count)
        ]

    def _on_instance_change(self) -> None:
        if self.broken:
            reason = self.instances[0].broken
            log.error("model %s version %s cannot serve: %s", self.folder.name, self.version, reason)
            self.queue.refuse(Kind.NOT_READY, f"model '{self.folder.name}' is not at ready state: {reason}")
        else:
            self.queue.accept()

    def _on_replaced(self, old: Instance, new: Instance) -> None:
        self.instances = [new if one is old else one for one in self.instances]

    async def _stop_instances(self) -> None:
        await asyncio.gather(*(self._supervisor.stop_instance(instance) for instance in self.instances))


def version_print(folder: ModelFolder, version: int) -> str:
    """What changes when the version has to be loaded anew: its own files, or the model's configuration."""
    return f"{folder.config_print}/{folder.versions[version].print}"
