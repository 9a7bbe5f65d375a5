"""One version of a model while it is served: its instances, its queue, and what clients may ask about it."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from time import monotonic, monotonic_ns

from headrace.batching.queue import BatchQueue
from headrace.batching.sequence_queue import SequenceQueue
from headrace.core.errors import InvalidRequest, Kind
from headrace.core.model import ModelInfo, Signature
from headrace.core.request import Parameters
from headrace.core.statistics import Statistics
from headrace.core.validation import InputChecker
from headrace.repository.declared import reshapes
from headrace.repository.form import ServedForm
from headrace.repository.layout import ModelFolder, VersionFiles
from headrace.repository.pager import Pager
from headrace.repository.planned import Planned
from headrace.repository.residence import Residence
from headrace.repository.served_queue import limits_for, queue_for
from headrace.repository.trust import Trust
from headrace.workers.frames import Loaded
from headrace.workers.instance import Instance
from headrace.workers.loads import LoadRefused
from headrace.workers.supervisor import Supervisor
from headrace_backends.optimize.misfit import misfit
from headrace_backends.registry import PLATFORMS

log = logging.getLogger(__name__)

VACATE_S = 10.0  # that running batches have before a distrusted form is asked to leave the memory
VACATE_INTERVAL_S = 0.02
# As the configuration's own check has it; a Python model may show only when it is loaded that it streams.
NOT_FORESEEN = (
    "batching.p99_objective_ms is not for a decoupled model, whose answers have no end that can be foreseen; its "
    "code makes it one"
)
MAX_LEVELS_SHOWN = 16  # a level is a number in a request; metrics are not to have a series for any of them


class ServedVersion:
    """Made for a version that is to be loaded; usable once ``start`` has returned, until ``drain`` is called.

    Where the memory has a limit (``pager``) it may be away: known, ready and without instances.
    """

    def __init__(
        self,
        folder: ModelFolder,
        files: VersionFiles,
        supervisor: Supervisor,
        *,
        with_summaries: bool = False,
        pager: Pager | None = None,
        planned: Planned | None = None,
    ) -> None:
        self.folder = folder
        self.files = files
        self.planned = planned
        self._form = ServedForm(folder, files, planned)
        self.version = str(files.version)
        self.print = self._form.print
        self.identity = f"{self.version}/{self.print}"  # changes when the same request may have another answer
        self.statistics = Statistics(with_summaries=with_summaries)
        self.instances: list[Instance] = []
        # What every request asks for, as plain attributes.
        batching = folder.config.batching
        self.policy = batching.policy()
        self.policies = batching.level_policies()  # of the levels that have one of their own
        self.default_priority = batching.default_level
        # For requests that bring neither a priority nor a timeout; 0 is none.
        self.default_timeout_us = self.policies.get(self.default_priority, self.policy).default_timeout_us
        self.max_batch_size = 0  # rows in one execution; 0 where requests are never merged
        self.decoupled = False  # whether a request is answered with any number of responses
        self.cached = folder.config.response_cache
        self.levels_shown = range(1, min(batching.priority_levels, MAX_LEVELS_SHOWN) + 1)  # even if nothing waits
        self._priority_levels = batching.priority_levels
        self._supervisor = supervisor
        self._residence = Residence(self, pager) if pager is not None else None
        self._loaded: Loaded | None = None  # as it was the first time
        self.distrusted = ""  # why another form is to take its place; empty while it is trusted
        self.on_distrust: Callable[[ServedVersion], None] = lambda _: None  # told when it is not any more
        self.checked_at_ns = 0  # when its recorded requests were last answered right
        self._trust = Trust()
        self.handed_over = False  # whether another answers what waited here when it was distrusted
        self._given_up = False
        # Filled by start, when the model file has told what it takes.
        self.info: ModelInfo
        self.checker: InputChecker
        self.queue: BatchQueue | SequenceQueue

    @property
    def ready(self) -> bool:
        """Whether an instance is up, or will be for a request; false while all workers are being started again."""
        if self._given_up:
            return False
        if self.distrusted:  # what comes is answered by its successor, which is being loaded
            return True
        if self._residence is not None and self._residence.is_away:
            return not self._residence.unready
        return any(instance.is_up for instance in self.instances)

    @property
    def broken(self) -> bool:
        """Whether no instance can come back by itself."""
        return self._given_up or (bool(self.instances) and all(instance.broken for instance in self.instances))

    @property
    def why_unready(self) -> str:
        """Why it is not ready."""
        if self._given_up:
            return self.distrusted
        unready = self._residence.unready if self._residence is not None else ""
        reasons = (one.broken or one.pause.reason for one in self.instances)
        return unready or next(filter(None, reasons), "its worker is restarting")

    @property
    def notes(self) -> tuple[str, ...]:
        """What the backend decided by itself."""
        return self._loaded.notes if self._loaded is not None else ()

    @property
    def reshaped(self) -> bool:
        """Whether clients see tensors in other shapes than the model has them."""
        return bool(reshapes(self.folder))

    @property
    def resident(self) -> bool:
        """Whether it is in memory, in its workers' at least."""
        return self._residence is None or not self._residence.is_away

    @property
    def memory_bytes(self) -> int:
        """What it took in memory when it was loaded last: its workers', or its share of theirs. 0: not measured."""
        return self._residence.nbytes if self._residence is not None else 0

    def priority(self, parameters: Parameters, *, for_another: bool = False) -> int:
        """The request's level: 1 is served first; 0 or none asks for the default.

        So does a level beyond the last where the request is made ``for_another`` model's, which may have more of them.
        """
        levels = self._priority_levels
        wanted = parameters.get("priority", 0)
        if not levels or not wanted:
            return self.default_priority
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 < wanted <= levels:
            if for_another and type(wanted) is int and wanted > levels:
                return self.default_priority
            raise InvalidRequest(
                f"model '{self.folder.name}': parameter 'priority' is {wanted!r}, expected 1 (served first) to {levels}"
            )
        return wanted

    async def start(self) -> None:
        """Load every instance.

        Raises:
            LoadRefused: one of them was refused; none is left running then.
        """
        self.queue = queue_for(self.folder, self._form.count)
        if self._residence is None:
            await self.start_instances()
        else:
            await self._residence.come()

    async def drain(self) -> None:
        """Answer what was accepted, then stop the instances. Nobody may put requests into the queue any more."""
        for instance in self.instances:
            self._supervisor.expect_leave(instance)
        await self.queue.drained()
        if self._residence is None:
            await self.stop_instances()
        else:
            await self._residence.close()

    # -- what its residence asks --------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The model's name."""
        return self.folder.name

    @property
    def label(self) -> str:
        """What the log calls it."""
        return f"model {self.folder.name} version {self.version}"

    @property
    def pinned(self) -> bool:
        """Whether it stays in memory. The states of sequences are in the worker, so a stateful model does."""
        config = self.folder.config
        return (
            config.residency.pinned
            or self.folder.sequence is not None
            or config.batching.p99_objective_ms is not None  # no load is over within an objective
        )

    @property
    def estimated_bytes(self) -> int:
        """What it takes in memory at least, before anybody knows more: nobody is refused for a guess."""
        return self._form.estimated_bytes

    def measured_bytes(self) -> int:
        """What its instances take, which are up."""
        return max(self.estimated_bytes, sum(map(self._supervisor.memory_of, self.instances)))

    async def start_instances(self) -> None:
        """Load every instance.

        Raises:
            LoadRefused: one of them was refused; none is left running then.
        """
        started = monotonic()
        queue = self.queue
        config, supervisor = self._form.config, self._supervisor
        self.instances = [
            Instance(
                load,
                queue.for_instance(index),
                self.statistics,
                supervisor.turns,
                config.execution_timeout_s,
                config.cpu_weight,
            )
            for index, load in enumerate(self._form.loads(supervisor.cpus(), supervisor.number))
        ]
        limit_bytes = config.memory_limit_bytes
        for instance in self.instances:
            instance.memory_limit_bytes = limit_bytes
            instance.on_loaded = self._on_loaded
            instance.on_replaced = self._on_replaced
            instance.loaded = self._loaded  # so that it breaks where the files have changed since the first time
        needs = self._form.needs(self._loaded, pages=self._residence is not None and not self.pinned)
        starts = [supervisor.start_instance(*one) for one in zip(self.instances, needs, strict=True)]
        results = await asyncio.gather(*starts, return_exceptions=True)
        refused = [result for result in results if isinstance(result, BaseException)]
        refused += [LoadRefused(one.broken) for one in self.instances if one.broken]
        if not refused and queue.objective is not None and self.instances[0].signature.decoupled:
            refused.append(LoadRefused(NOT_FORESEEN))
        if (
            not refused
            and self.planned is not None
            and (reference := self.planned.plan.signature) is not None
            and (wrong := misfit(reference, self.instances[0].signature))
        ):
            refused.append(LoadRefused(wrong))
        if refused:
            await self.stop_instances()
            raise refused[0]
        self.checked_at_ns = monotonic_ns()
        if self._loaded is None:
            self._loaded = self.instances[0].loaded
            self._describe(self.instances[0].signature)
        for instance in self.instances:
            instance.on_change = self._on_instance_change
            if self.planned is not None:
                instance.on_death = self._on_death
        self.statistics.load_seconds = monotonic() - started

    async def stop_instances(self) -> None:
        """Stop every instance; what one has taken it answers first. There are none then."""
        await asyncio.gather(*(self._stop(instance) for instance in self.instances))
        self.instances = []

    # -- when a plan turns out to be wrong ----------------------------------------------------------------

    def distrust(self, reason: str) -> bool:
        """Take no more batches: another form is to take its place, and what waits here waits for that.

        Returns whether there is another form. What is running is answered when it ends.
        """
        if self.planned is None:
            return False
        if not self.distrusted:
            self.distrusted = reason
            for instance in self.instances:
                instance.hold()
            self.on_distrust(self)
        return True

    def give_up(self, reason: str) -> None:
        """No other form could take its place: refuse what waits, and what comes."""
        self.distrusted, self._given_up = reason, True
        self.queue.refuse(Kind.NOT_READY, f"model '{self.folder.name}' is not at ready state: {reason}")

    async def vacate(self) -> None:
        """Leave the memory to the form that takes its place, where that has a limit, once what runs is answered."""
        if self._residence is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(VACATE_S):
                while self.queue.executing:
                    await asyncio.sleep(VACATE_INTERVAL_S)
        await self._residence.close()

    def hand_over(self, successor: "ServedVersion") -> None:
        """Have the form that takes its place answer what waits here. Nothing happens while this one is trusted."""
        if self.distrusted:
            assert isinstance(self.queue, BatchQueue), "sequences are not run by plans"
            assert isinstance(successor.queue, BatchQueue), "sequences are not run by plans"
            self.queue.hand_over(successor.queue, successor.statistics)
            self.handed_over = True

    def _on_death(self, cause: str, used_up: bool) -> None:
        if self._trust.died(monotonic_ns(), used_up=used_up):
            self.distrust(f"its worker died while it ran requests: {cause}")

    # -- small things -------------------------------------------------------------------------------------

    def _on_loaded(self, loaded: Instance) -> None:
        """A worker has read the files, which may be others now than before, and than those of other instances."""
        prints = {one.loaded.files_print for one in (*self.instances, loaded) if one.loaded is not None}
        found = [] if prints == {self.files.print} else sorted(prints)
        self.identity = "/".join([self.version, self.print, *found])

    async def _stop(self, instance: Instance) -> None:
        if instance.in_flight:
            await instance.leave()
        await self._supervisor.stop_instance(instance)

    def _describe(self, signature: Signature) -> None:
        places = max(1, signature.max_batch_size)
        self.queue.set_limits(limits_for(self.folder.config.batching, signature), places=places)
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

    def _on_instance_change(self) -> None:
        if self.distrusted:
            return
        if self.broken:
            reason = self.instances[0].broken
            if self.distrust(reason):
                return
            log.error("model %s version %s cannot serve: %s", self.folder.name, self.version, reason)
            self.queue.refuse(Kind.NOT_READY, f"model '{self.folder.name}' is not at ready state: {reason}")
        else:
            self.queue.accept()

    def _on_replaced(self, old: Instance, new: Instance) -> None:
        self.instances = [new if one is old else one for one in self.instances]
        self._on_loaded(new)
        if self.distrusted:
            new.hold()
        self._on_instance_change()  # the old one may have broken meanwhile, which is nobody's matter any more
