"""One instance of a model: hands the batches that it takes to its worker, and answers them when they come back."""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic_ns, time
from typing import Protocol

import msgspec

from headrace.batching.pending import Pending
from headrace.batching.queue import BatchQueue
from headrace.batching.streamed import StreamedRequest
from headrace.core.custom_metric import CustomMetric
from headrace.core.errors import HeadraceError, InternalError, Kind, of_kind
from headrace.core.model import Signature
from headrace.core.statistics import Statistics
from headrace.workers import packing
from headrace.workers.answering import answer_each, answer_jointly
from headrace.workers.arena import Segment, begun
from headrace.workers.frames import (
    Begun,
    Done,
    Ended,
    Failed,
    Load,
    Loaded,
    Part,
    Run,
    ToWorker,
)
from headrace.workers.handover import Handover
from headrace.workers.lending import Attachments
from headrace.workers.open_streams import OpenStreams
from headrace.workers.permit import Permit
from headrace.workers.pump import Pump
from headrace.workers.rate_limit import RateLimiter
from headrace.workers.resources import Claim
from headrace.workers.restarts import Pause
from headrace.workers.second_chance import MAX_DEATHS, living, survivors
from headrace.workers.slots import Slot
from headrace.workers.turns import CpuTurns

log = logging.getLogger(__name__)

LEAVE_INTERVAL_S = 0.02  # one that leaves is looked at so often


class Host(Protocol):
    """What an instance needs of the process that it lives in."""

    def run(self, batch: "Batch", frame: Run, descriptors: list[int]) -> None:
        """Have the worker run this batch; the instance is told of the end."""

    def tell(self, frame: ToWorker) -> None:
        """Send the worker what is not answered."""

    @property
    def attachments(self) -> Attachments:
        """The segments of other workers that it has."""

    def next_sequence(self) -> int:
        """A number for the next batch."""

    def kill(self, cause: str) -> None:
        """End the process; it comes back with everything that it hosted."""


class Batch:
    """Requests that run together, and the slot that they occupy."""

    __slots__ = ("instance", "pending", "sequence", "slot")

    def __init__(self, instance: "Instance", slot: Slot, pending: list[Pending], sequence: int) -> None:
        self.instance = instance
        self.slot = slot
        self.pending = pending
        self.sequence = sequence

    @property
    def begun(self) -> bool:
        """Whether the worker has begun to run it."""
        return self.slot.inputs is not None and begun(self.slot.inputs.view) == self.sequence


class Instance:
    """One model loaded in one worker process, seen from the front process.

    It pumps while its process is up: the host calls ``up``, ``done``, ``failed`` and ``down``. All of it
    runs on the event loop.
    """

    def __init__(
        self,
        load: Load,
        queue: BatchQueue,
        statistics: Statistics,
        turns: CpuTurns,
        execution_timeout_s: float,
        cpu_weight: float = 1.0,
    ) -> None:
        self.load = load
        self.execution_timeout_s = execution_timeout_s
        self.loaded: Loaded | None = None
        self.broken = ""  # why it cannot come back by itself; empty while it can
        self.pause = Pause()  # for how long it is left alone because it keeps dying, until it is up
        self.on_change: Callable[[], None] = lambda: None  # told when it breaks, and when it is up again
        self.on_loaded: Callable[[Instance], None] = lambda _: None  # told before it takes the first batch of each life
        self.on_replaced: Callable[[Instance, Instance], None] = lambda _old, _new: None  # told of its successor
        # Where the model can be run in another form: told of the cause when a worker dies that ran a batch, and
        # whether one of the batch's requests has used up its chances here.
        self.on_death: Callable[[str, bool], None] | None = None
        self.up_at_ns = 0  # when it was loaded last; 0 while it was not
        self.used_at_ns = 0  # when it answered anything last; 0 while it has not
        self.memory_limit_bytes = 0  # that its worker may have; 0 for no bound
        self.streams = OpenStreams(load.name)
        self.custom_metrics: tuple[CustomMetric, ...] = ()  # that the model's own code keeps
        self._queue = queue
        self._statistics = statistics
        self._permit = Permit(load.name, turns, cpu_weight)
        self._ended_ns = 0  # when the last batch did
        self._host: Host | None = None
        self._pump = Pump(
            load.name, queue, self._permit, self.streams, self._send, of_sequences=load.sequence is not None
        )
        self._leaving = False
        self._held = False

    @property
    def is_up(self) -> bool:
        """Whether it can run a batch now."""
        return self._pump.running

    @property
    def in_flight(self) -> int:
        """Requests that the worker has."""
        return self._pump.in_flight

    @property
    def waiting(self) -> int:
        """Requests in its queue."""
        return len(self._queue)

    @property
    def signature(self) -> Signature:
        """What the model takes and gives; known once it was loaded."""
        assert self.loaded is not None, "an instance has a signature once it is loaded"
        return self.loaded.signature

    # -- from its start to its end ------------------------------------------------------------------------

    def limit(self, limiter: RateLimiter, claim: Claim) -> None:
        """Have it run a batch only with what it claims; before it is up."""
        self._permit.limit(limiter, claim)

    def up(self, host: Host, loaded: Loaded) -> None:
        """The process has loaded the model, for the first time or again."""
        if self.loaded is not None and loaded.signature != self.loaded.signature:
            self.break_down("the model's files have changed since it was loaded")
            return
        self.loaded = loaded
        self.up_at_ns = monotonic_ns()
        self.broken, self.pause = "", Pause()
        self._host = host
        self._pump.let_go()
        self.on_loaded(self)

    def start(self) -> None:
        """Begin to take batches."""
        if self._leaving:  # its process died meanwhile and has come back
            return
        assert self.loaded is not None, "only an instance that is up pumps"
        self._pump.start(self.loaded).add_done_callback(self._on_pump_end)
        self.on_change()

    def _on_pump_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.critical("an instance of model %s has stopped working", self.load.name, exc_info=task.exception())
            if self._host is not None:
                self._host.kill("one of its instances has stopped working")

    def stop(self) -> None:
        """Take no more batches. What is running is answered when it ends."""
        self._pump.stop()

    def break_down(self, reason: str) -> None:
        """It cannot serve, and trying again will not help soon."""
        self.stop()
        self.broken = reason
        self.on_change()

    def leave_alone(self, pause: Pause) -> None:
        """It is down, and not loaded again before the pause is over."""
        self.pause = pause
        if pause.hopeless and self.loaded is not None:
            self.break_down(pause.reason)

    def retire(self) -> None:
        """Stop for good, and let go of the shared memory."""
        self.stop()
        self._permit.give()
        self._pump.let_go()
        self._host = None
        self.on_change = lambda: None

    # -- when another takes its place ---------------------------------------------------------------------

    def twin(self, number: int) -> "Instance":
        """Another one of the same model, to be loaded elsewhere in this one's place."""
        load = msgspec.structs.replace(self.load, instance=number)
        permit = self._permit
        twin = Instance(
            load, self._queue.successor(), self._statistics, permit.turns, self.execution_timeout_s, permit.cpu_weight
        )
        twin.memory_limit_bytes = self.memory_limit_bytes
        twin.loaded = self.loaded  # so that it breaks where the files have changed meanwhile
        twin.on_loaded = self.on_loaded
        if self._held:
            twin.hold()
        return twin

    def replaced_by(self, twin: "Instance") -> None:
        """Tell whoever has this one that the twin, which is up, stands in its place from now on."""
        twin.on_change, twin.on_replaced, twin.on_death = self.on_change, self.on_replaced, self.on_death
        self.on_change = lambda: None
        self.on_replaced(self, twin)

    def hold(self) -> None:
        """Take no more batches, for good, also when its process comes back or another takes its place."""
        self._held = self._leaving = True
        self.stop()

    async def leave(self) -> None:
        """Take nothing new; return when all that was taken is answered, and every sequence that it has has ended."""
        self._queue.leave()
        while self._queue.held:
            await asyncio.sleep(LEAVE_INTERVAL_S)
        self._leaving = True
        self.stop()
        while self.in_flight:
            await asyncio.sleep(LEAVE_INTERVAL_S)
        self._queue.close()

    # -- a batch goes to the worker -----------------------------------------------------------------------

    def _send(self, slot: Slot, pending: list[Pending]) -> None:
        host, loaded, pump = self._host, self.loaded, self._pump
        assert host is not None, "only an instance that is up pumps"
        assert loaded is not None, "only an instance that is up pumps"
        handover = Handover(slot, host.attachments)
        handover.prepare(self.load, loaded, host.next_sequence(), pending)
        try:
            batch = Batch(self, slot, pending, handover.frame.sequence)
            host.run(batch, handover.frame, handover.descriptors)
        except BaseException:
            handover.undo()
            raise
        pump.in_flight += len(pending)
        if self._queue.objective is not None:
            expected_ns = self._queue.forecast().expected_ns(pending[0].key, sum(one.rows for one in pending))
            pump.place.taken(batch, expected_ns, monotonic_ns())

    # -- and comes back -----------------------------------------------------------------------------------

    def done(self, batch: Batch, frame: Done, segment: Segment | None) -> None:
        """The worker has run the batch; ``segment`` is the slot's new output segment, if it has one."""
        pump = self._pump
        pump.in_flight -= len(batch.pending)
        slot = batch.slot
        if segment is not None:
            slot.outputs = segment
        pending = batch.pending
        in_all = sum([one.rows for one in pending])
        observe = self._queue.deadlines.observe
        if observe is not None:
            observe(in_all, frame.input_ns + frame.infer_ns + frame.output_ns)
        most = max(1, self.signature.max_batch_size)
        self.used_at_ns = now_ns = monotonic_ns()
        pump.regroup.ended(len(pending), len(self._queue), most, frame.infer_ns, now_ns)
        # What it cost those who waited: also the handing over, the turn, and what else runs on the machine.
        began_ns = max(pending[0].taken_at_ns, self._ended_ns)
        self._queue.ran(pending, in_all, now_ns - began_ns + self._permit.waited_ns, now_ns)
        self._ended_ns = now_ns
        pump.place.ended(batch, now_ns)
        for one in pending:
            if one.traced:
                one.timings = (frame.input_ns, frame.infer_ns, frame.output_ns)
        lent = pump.slots.lend(slot) if all(one.request.borrows for one in pending) else None
        extract: packing.Extract = packing.copy if lent is None else packing.view
        view = slot.outputs.view if slot.outputs is not None else memoryview(b"")
        if lent is not None:
            view = lent
        answered = 0
        if frame.answers:
            answered = answer_each(self.load.name, self.signature, pending, frame, view, extract)
        else:
            try:
                answered = answer_jointly(self.signature, pending, frame, view, extract)
            except InternalError as error:
                self._run_alone(pending, InternalError(f"model '{self.load.name}': {error}"))
        if pending[0].counts:
            self._statistics.executed(answered, in_all, frame.input_ns, frame.infer_ns, frame.output_ns)
        if lent is None:
            pump.slots.give(slot)
        pump.batch_ended(pending)

    def failed(self, batch: Batch, frame: Failed) -> None:
        """The model refused the batch. Its members run again, each alone, so that only the bad one fails."""
        pump = self._pump
        pump.in_flight -= len(batch.pending)
        self.used_at_ns = monotonic_ns()
        message = f"model '{self.load.name}': {frame.message}"
        error = of_kind(Kind(frame.kind), message)
        if len(batch.pending) > 1:
            self._run_alone(batch.pending, error)
        else:
            batch.pending[0].fail(error)
        pump.slots.give(batch.slot)
        pump.place.ended(batch, self.used_at_ns)
        pump.batch_ended(batch.pending)

    def _run_alone(self, pending: list[Pending], error: HeadraceError) -> None:
        """Put the members of a failed batch back, each to be run alone; one that was alone has its answer.

        What may remember the first time is not given a request of a sequence twice.
        """
        once = self.load.sequence is not None and self.loaded is not None and self.loaded.remembers
        if len(pending) == 1 or once:
            for one in pending:
                one.fail(error)
            return
        log.info("batch of %d requests failed, running them one by one: %s", len(pending), error)
        self._statistics.retries += len(pending)
        for one in pending:
            one.alone = True
        self._queue.put_back(pending)

    def abandon(self, batch: Batch, error: Exception) -> None:
        """The batch has been answered, and the answer could not be taken; its process is about to be killed."""
        for one in batch.pending:
            one.fail(InternalError(f"model '{self.load.name}': the answer could not be taken: {error}"))
        self._queue.finished(batch.pending)

    # -- or its request is answered part by part ----------------------------------------------------------

    def begun(self, batch: Batch, frame: Begun) -> None:
        """The worker has taken a decoupled request out of its slot and will answer it part by part."""
        (pending,) = batch.pending
        assert isinstance(pending, StreamedRequest), "a decoupled model is given no other"
        host = self._host
        assert host is not None, "frames come from a host"
        self.streams.begin(frame, pending, host.tell)
        self._pump.slots.give(batch.slot)
        self._pump.end_turn_if_idle()

    def part(self, frame: Part) -> None:
        """One response to a decoupled request."""
        self._statistics.last_inference_ms = int(time() * 1000)
        self.used_at_ns = monotonic_ns()
        self.streams.part(frame)

    def ended(self, frame: Ended) -> None:
        """The last response to a decoupled request."""
        self.used_at_ns = monotonic_ns()
        pending = self.streams.end(frame)
        if pending is not None:
            self._pump.stream_ended(pending)

    # -- or the process dies ------------------------------------------------------------------------------

    def down(self, executing: Batch | None, staged: list[Batch], cause: str) -> None:
        """The process has died. What it was executing is suspect, what was staged is not."""
        self.stop()
        self._host = None
        self._pump.lose()
        self._statistics.worker_deaths += 1
        self._queue.lose(cause)
        if executing is not None:
            again = survivors(
                executing.pending, self.load.name, cause, self.up_at_ns, elsewhere=self.on_death is not None
            )
            self._statistics.retries += len(again)
            self._queue.put_back(again)
            self._queue.finished(executing.pending)
            if self.on_death is not None:
                self.on_death(cause, any(one.deaths >= MAX_DEATHS for one in again))
        for batch in reversed(staged):
            self._queue.put_back(living(batch.pending))
            self._queue.finished(batch.pending)
        for pending in self.streams.lose(cause):
            self._queue.finished([pending])
