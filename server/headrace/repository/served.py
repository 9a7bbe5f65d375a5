"""One version of a model while it is served: its instances, its queue, and what clients may ask about it."""

import asyncio
import logging
from time import monotonic

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
from headrace.workers.cpus import threads_for
from headrace.workers.frames import Load
from headrace.workers.instance import Instance
from headrace.workers.supervisor import Needs, Supervisor
from headrace_backends.registry import PLATFORMS, SHAREABLE

log = logging.getLogger(__name__)


class ServedVersion:
    """Made for a version that is to be loaded; usable once ``start`` has returned, until ``drain`` is called."""

    def __init__(
        self, folder: ModelFolder, files: VersionFiles, supervisor: Supervisor, *, with_summaries: bool = False
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
        # Filled by start, when the model file has told what it takes.
        self.info: ModelInfo
        self.checker: InputChecker
        self.queue: BatchQueue | SequenceQueue

    @property
    def ready(self) -> bool:
        """Whether an instance is up; false while all workers are being started again."""
        return any(instance.is_up for instance in self.instances)

    @property
    def broken(self) -> bool:
        """Whether no instance can come back by itself."""
        return all(instance.broken for instance in self.instances)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the backend decided by itself."""
        loaded = self.instances[0].loaded if self.instances else None
        return loaded.notes if loaded is not None else ()

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
        queue = self._queue_until_known()
        timeout_s = self.folder.config.execution_timeout_s
        self.instances = [
            Instance(load, queue.for_instance(index), self.statistics, self._supervisor.turns, timeout_s)
            for index, load in enumerate(self._loads())
        ]
        limit_bytes = self.folder.config.memory_limit_bytes
        for instance in self.instances:
            instance.memory_limit_bytes = limit_bytes
            instance.on_replaced = self._on_replaced
        # What is bounded by itself must be measured by itself.
        needs = Needs(self.files.model_bytes, self.files.backend in SHAREABLE and not limit_bytes)
        starts = [self._supervisor.start_instance(instance, needs) for instance in self.instances]
        results = await asyncio.gather(*starts, return_exceptions=True)
        refused = [result for result in results if isinstance(result, BaseException)]
        if refused:
            await self._stop_instances()
            raise refused[0]
        self._describe(self.instances[0].signature)
        for instance in self.instances:
            instance.on_change = self._on_instance_change
        self.statistics.load_seconds = monotonic() - started

    async def drain(self) -> None:
        """Answer what was accepted, then stop the instances. Nobody may put requests into the queue any more."""
        await self.queue.drained()
        await self._stop_instances()

    def _queue_until_known(self) -> BatchQueue | SequenceQueue:
        batching, name, spec = self.folder.config.batching, self.folder.name, self.folder.sequence
        order = batching.preserve_order
        if spec is None:
            self.queue = BatchQueue(name, BatchLimits(), batching.max_queue_size, preserve_order=order)
        else:
            self.queue = SequenceQueue(name, spec, batching.max_queue_size, preserve_order=order)
        return self.queue

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
            self._supervisor.turns.cpus,
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
