"""One worker process and the instances that it hosts, brought back whenever it dies."""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Sequence
from time import monotonic, monotonic_ns
from typing import Protocol

import msgspec

from headrace.core.device import CPU
from headrace.log import LogLevels
from headrace.workers import channel, frames
from headrace.workers.arena import Segment
from headrace.workers.instance import Batch, Instance
from headrace.workers.lending import PASS_BYTES, Attachments
from headrace.workers.numa import Node
from headrace.workers.placement import backoff_s
from headrace.workers.spawn import spawn

log = logging.getLogger(__name__)

LOAD_ATTEMPTS = 3  # a load during which the process died is tried again: somebody else may have killed it
GIVE_UP_AFTER_S = 15.0  # for so long starts must fail, three times at least, before waiting requests are told
_GIVE_UP_FAILURES = 3
RELOAD_AFTER_S = 5.0
Asked = frames.Call | frames.CallEnd | frames.CallCredit | frames.Ask


class CallDesk(Protocol):
    """Where the calls go that a worker's models make of other models, and of the repository."""

    def take(self, process: "WorkerProcess", frame: Asked, descriptors: list[int]) -> None:
        """One more call, or word about one. The descriptors are closed after the call."""

    def worker_died(self, process: "WorkerProcess") -> None:
        """Nobody waits for the answers to that process's calls any more."""


class LoadRefused(Exception):
    """The model could not be loaded; the message is for the model's owner."""


class _Loading:
    """A Load that was sent, or will be when the process is there, and who waits for its answer."""

    __slots__ = ("deaths", "future", "instance")

    def __init__(self, instance: Instance, future: asyncio.Future[None] | None) -> None:
        self.instance = instance
        self.future = future  # None when an instance that was up before is loaded again
        self.deaths = 0


class WorkerProcess:
    """A worker process over its lives: spawned, killed, spawned again with all that it hosted.

    The worker is single-threaded: it answers loads and batches strictly in the order in which they were sent.
    So the oldest unanswered batch is the one that it was executing when it died.
    """

    def __init__(
        self,
        name: str,
        *,
        shared: bool,
        threads: int,
        log_format: str,
        desk: CallDesk | None = None,
        node: Node | None = None,
        device: str = CPU,
        visible_gpus: str | None = None,
    ) -> None:
        self.name = name
        self.shared = shared
        self.device = device  # of everything that it hosts
        self._visible_gpus = visible_gpus  # CUDA_VISIBLE_DEVICES for it; None for the server's own
        self.hosted: dict[int, Instance] = {}
        self.restarts = -1
        self.threads = threads
        self.node = node  # whose CPUs it is kept to
        self.leaving = False  # whether another is to take its place: nothing more is loaded here
        self._log_format = log_format
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: channel.Channel | None = None
        self._loading: dict[int, _Loading] = {}  # by instance; sent or still to be sent
        self._asked: dict[int, Batch | _Loading] = {}  # sent and not answered, oldest first
        self._begun: dict[int, Batch] = {}  # decoupled requests that are being answered part by part
        self._levels: LogLevels | None = None
        self.attachments = Attachments(self._detach)
        self._desk = desk  # where its models' calls of other models go
        self._head_since = 0.0
        self._heard_at = 0.0
        self._sequence = 0
        self._failures = 0  # starts in a row that never got ready
        self._failing_since = 0.0
        self._kill_cause = ""
        self._timed_out = False
        self._stopping = False
        self._task = asyncio.get_running_loop().create_task(self._keep_alive())
        self._task.add_done_callback(self._on_end)

    @property
    def pid(self) -> int | None:
        """The process now, if there is one."""
        return self._process.pid if self._process is not None else None

    @property
    def is_loading(self) -> bool:
        """Whether a model is being loaded, or is to be."""
        return bool(self._loading)

    @property
    def used_at_ns(self) -> int:
        """When a model of it was used last: now, where one is at work; 0 where none ever was."""
        if any(instance.in_flight for instance in self.hosted.values()):
            return monotonic_ns()
        return max((instance.used_at_ns for instance in self.hosted.values()), default=0)

    @property
    def batches(self) -> int:
        """How many it was ever given."""
        return self._sequence

    # -- what the supervisor asks -------------------------------------------------------------------------

    async def load(self, instance: Instance) -> None:
        """Load a model here; returns once it takes batches.

        Raises:
            LoadRefused: with the reason; the instance is not hosted here then.
        """
        try:
            frames.encode(instance.load)
        except (OverflowError, UnicodeError, TypeError) as error:
            raise LoadRefused(f"its configuration cannot be handed to a worker: {error}") from error
        self.hosted[instance.load.instance] = instance
        loading = _Loading(instance, asyncio.get_running_loop().create_future())
        self._loading[instance.load.instance] = loading
        if self._channel is not None:
            self._send_load(loading)
        assert loading.future is not None
        try:
            await loading.future
        except BaseException:
            self.unload(instance)
            raise

    def take_over(self, instance: Instance, old: "WorkerProcess") -> None:
        """Host one that broke when it was loaded again in ``old``; it is tried here as it was there."""
        del old.hosted[instance.load.instance]
        self.hosted[instance.load.instance] = instance
        self._load_again(instance)

    def unload(self, instance: Instance) -> None:
        """Forget a model that has no batch running any more."""
        instance.retire()
        self._loading.pop(instance.load.instance, None)
        if self.hosted.pop(instance.load.instance, None) is not None and self._channel is not None:
            self._channel.send(frames.encode(frames.Unload(instance.load.instance)))

    async def stop(self, grace_s: float = 5.0) -> None:
        """End the process: by request, and by force when it does not follow."""
        self._stopping = True
        if isinstance(self._head(), _Loading):
            self.kill("stopped while it loaded a model")
        elif self._channel is not None:
            self._channel.send(frames.encode(frames.Stop()))
        _, unfinished = await asyncio.wait([self._task], timeout=grace_s)
        if unfinished:
            self.kill("did not stop when asked to")
            await asyncio.wait([self._task])

    async def end(self, cause: str) -> None:
        """End the process at once, for good: what it was at fails or runs elsewhere, as when it dies."""
        self._stopping = True
        self.kill(cause)
        await asyncio.wait([self._task])

    def set_logging(self, levels: LogLevels) -> None:
        """Have the worker log so, in this life and the next ones."""
        self._levels = levels
        self.tell(frames.Logging(levels))

    def kill(self, cause: str) -> None:
        """End the process at once; what it hosted comes back with the next one."""
        if self._process is not None:
            log.warning("killing worker %s (pid %d): %s", self.name, self._process.pid, cause)
            self._kill_cause = cause
            self._process.kill()

    def check_time(self, now: float, load_timeout_s: float) -> None:
        """Kill the process when a batch or a load has taken longer than it may."""
        head = self._head()
        if head is None:
            self._check_streams(now)
            return
        is_batch = isinstance(head, Batch)
        limit_s = head.instance.execution_timeout_s if is_batch else load_timeout_s
        if limit_s and now - self._head_since > limit_s:
            what = "a batch of" if is_batch else "loading"
            self._timed_out = True
            self.kill(f"{what} model '{head.instance.load.name}' took longer than {limit_s:g} s")

    def _check_streams(self, now: float) -> None:
        for instance in self.hosted.values():
            limit_s = instance.execution_timeout_s
            since = max(self._heard_at, instance.streams.awaited_since)
            if limit_s and instance.streams.awaited and now - since > limit_s:
                self.kill(f"model '{instance.load.name}' gave no response for {limit_s:g} s")
                return

    # -- what the instances ask ---------------------------------------------------------------------------

    def _detach(self, segment: int) -> None:
        self.tell(frames.Detach(segment))

    def next_sequence(self) -> int:
        """A number for the next batch."""
        self._sequence += 1
        return self._sequence

    def run(self, batch: Batch, frame: frames.Run, descriptors: list[int]) -> None:
        """Have the worker run this batch."""
        self._ask(frame.sequence, batch, frame, descriptors)

    def tell(self, frame: frames.ToWorker, descriptors: Sequence[int] = ()) -> None:
        """Send the worker what is not answered; the descriptors are taken over. Nothing is sent while it is down."""
        try:
            data = frames.encode(frame)
        except BaseException:
            channel.close_all(descriptors)
            raise
        if self._channel is not None:
            self._channel.send(data, descriptors)
        else:
            channel.close_all(descriptors)

    # -- the process's lives ------------------------------------------------------------------------------

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """Nobody looks after the process any more: as wished, or because of a bug, which must not hang anybody."""
        if task.cancelled() or task.exception() is None:
            return
        log.critical("worker %s is given up", self.name, exc_info=task.exception())
        self.kill("it is not looked after any more")
        for instance in self.hosted.values():
            instance.break_down("its worker process was given up; the server's log says why")
        for loading in self._loading.values():
            if loading.future is not None and not loading.future.done():
                loading.future.set_exception(LoadRefused("its worker process was given up"))

    async def _keep_alive(self) -> None:
        while not self._stopping:
            await asyncio.sleep(backoff_s(self._failures))
            if self._stopping:
                return
            try:
                exited = self._spawn()
            except OSError as error:
                self._note_no_process(error)
                continue
            if self._levels is not None:
                self.tell(frames.Logging(self._levels))
            for loading in list(self._loading.values()):
                self._send_load(loading)
            await exited
            self._bury()

    def _spawn(self) -> asyncio.Future[None]:
        """Start the process; the future resolves when it has ended."""
        spawned = spawn(
            self.name,
            shared=self.shared,
            threads=self.threads,
            log_format=self._log_format,
            cpus=self.node.cpus if self.node is not None else None,
            visible_gpus=self._visible_gpus,
        )
        self._process = spawned.process
        self._channel = channel.Channel(spawned.socket, self._on_frame)
        self.attachments.forget_all()
        self.restarts += 1
        self._kill_cause, self._timed_out = "", False
        return spawned.exited

    def _bury(self) -> None:
        """The process has ended: take what it still said, then see to what it left undone."""
        assert self._process is not None
        assert self._channel is not None
        self._channel.read()
        self._channel.close()
        self._channel = None
        cause = self._kill_cause or _cause(self._process.wait())
        self._process = None
        unanswered = list(self._asked.values())
        self._asked.clear()
        self._begun.clear()
        if self._desk is not None:
            self._desk.worker_died(self)
        if unanswered or not self._stopping:
            log.warning("worker %s died: %s", self.name, cause)
        at_fault = unanswered[0] if unanswered else None
        if isinstance(at_fault, Batch) and not at_fault.begun:
            at_fault = None  # it lay in the socket of a process that was dead or waking up
        if isinstance(at_fault, _Loading):
            self._count_failure()
            self._note_failed_load(at_fault, cause)
        for key, instance in self.hosted.items():
            batches = [one for one in unanswered if isinstance(one, Batch) and one.instance is instance]
            executing = batches.pop(0) if batches and batches[0] is at_fault else None
            if instance.is_up or batches or executing is not None or len(instance.streams):
                instance.down(executing, batches, cause)
            if key not in self._loading:
                self._loading[key] = _Loading(instance, None)
        # Whoever is waited for most comes back first.
        self._loading = dict(sorted(self._loading.items(), key=lambda item: -item[1].instance.waiting))

    def _note_failed_load(self, loading: _Loading, cause: str) -> None:
        reason = f"the worker died while it loaded the model: {cause}"
        loading.deaths += 1
        if loading.future is not None:
            # A load that takes too long will do so again; one that was killed may have been in the way of another.
            if (loading.deaths >= LOAD_ATTEMPTS or self._timed_out) and not loading.future.done():
                loading.future.set_exception(LoadRefused(reason))
                del self._loading[loading.instance.load.instance]
        elif self._failures >= _GIVE_UP_FAILURES and monotonic() - self._failing_since > GIVE_UP_AFTER_S:
            for instance in self.hosted.values():
                if instance.loaded is not None:
                    instance.break_down(f"{reason}, {self._failures} times in a row; it goes on trying")

    def _count_failure(self) -> None:
        if not self._failures:
            self._failing_since = monotonic()
        self._failures += 1

    def _note_no_process(self, error: OSError) -> None:
        """The system gives no process now: whoever waits for a first load is told, everybody else waits."""
        log.error("cannot start worker %s: %s", self.name, error)
        self._count_failure()
        for loading in list(self._loading.values()):
            if loading.future is not None and not loading.future.done():
                loading.future.set_exception(LoadRefused(f"cannot start a worker process: {error}"))

    # -- what the worker is told --------------------------------------------------------------------------

    def _head(self) -> Batch | _Loading | None:
        """What the worker is at: the oldest thing that it was asked and has not answered."""
        return next(iter(self._asked.values()), None)

    def _ask(self, key: int, what: Batch | _Loading, frame: frames.ToWorker, descriptors: Sequence[int] = ()) -> None:
        assert self._channel is not None, "nothing is sent while the process is down"
        data = frames.encode(frame)
        self._channel.send(data, descriptors)
        if not self._asked:
            self._head_since = monotonic()
        self._asked[key] = what

    def _answered(self, key: int) -> Batch | _Loading:
        self._head_since = monotonic()
        return self._asked.pop(key)

    def _send_load(self, loading: _Loading) -> None:
        self._ask(-1 - loading.instance.load.instance, loading, loading.instance.load)

    # -- what the worker says -----------------------------------------------------------------------------

    def _on_frame(self, data: bytes, descriptors: list[int]) -> None:
        try:
            try:
                frame = frames.decode_from_worker(data)
            except msgspec.MsgspecError:
                log.exception("worker %s sent a frame that cannot be read", self.name)
                self.kill("it sent a frame that cannot be read")
                return
            self._heard_at = monotonic()
            if isinstance(frame, frames.Done | frames.Failed):
                self._on_batch_answer(frame, descriptors)
            elif isinstance(frame, frames.Begun | frames.Part | frames.Ended):
                self._on_stream(frame)
            elif isinstance(frame, frames.Loaded | frames.LoadFailed):
                self._on_load_answer(frame)
            elif isinstance(frame, frames.CustomMetrics):
                self._on_metrics(frame)
            elif self._desk is not None:
                self._desk.take(self, frame, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _on_batch_answer(self, frame: frames.Done | frames.Failed, descriptors: list[int]) -> None:
        if isinstance(frame, frames.Done) and frame.segment_bytes and not descriptors:
            # The kernel drops a descriptor that this process has no room for. The batch runs again.
            self.kill("its answer's memory could not be received; this process is out of file descriptors")
            return
        batch = self._answered(frame.sequence)
        assert isinstance(batch, Batch)
        try:
            if isinstance(frame, frames.Failed):
                batch.instance.failed(batch, frame)
            else:
                keep = frame.segment_bytes >= PASS_BYTES
                segment = Segment(descriptors[0], frame.segment_bytes, keep=keep) if descriptors else None
                batch.instance.done(batch, frame, segment)
        except Exception as error:
            log.exception("could not take an answer of worker %s", self.name)
            batch.instance.abandon(batch, error)
            self.kill("its answer could not be taken")

    def _on_stream(self, frame: frames.Begun | frames.Part | frames.Ended) -> None:
        """A decoupled request is begun, responded to or ended."""
        if isinstance(frame, frames.Begun):
            batch = self._answered(frame.sequence)
            assert isinstance(batch, Batch)
            self._begun[frame.sequence] = batch
            batch.instance.begun(batch, frame)
            return
        begun = self._begun.get(frame.sequence)
        if begun is None:
            return  # a thread of a model that has said its last word
        if isinstance(frame, frames.Part):
            begun.instance.part(frame)
        else:
            del self._begun[frame.sequence]
            begun.instance.ended(frame)

    def _on_metrics(self, frame: frames.CustomMetrics) -> None:
        instance = self.hosted.get(frame.instance)
        if instance is not None:
            instance.custom_metrics = frame.samples

    def batches_of(self, instance: int, sequence: int) -> list[Batch]:
        """The batch or stream of that number that the worker is at; with 0, all of the instance's."""
        if sequence:
            found = [self._asked.get(sequence) or self._begun.get(sequence)]
        else:
            found = [*self._asked.values(), *self._begun.values()]
        batches = [one for one in found if isinstance(one, Batch)]
        return batches if sequence else [one for one in batches if one.instance.load.instance == instance]

    def _on_load_answer(self, frame: frames.Loaded | frames.LoadFailed) -> None:
        self._failures = 0
        self._answered(-1 - frame.instance)
        loading = self._loading.pop(frame.instance, None)
        if loading is None:
            return  # unloaded meanwhile
        instance = loading.instance
        if isinstance(frame, frames.Loaded):
            instance.up(self, frame)
            if not instance.broken:
                instance.start()
        elif loading.future is None:
            instance.break_down(frame.reason)
            asyncio.get_running_loop().call_later(RELOAD_AFTER_S, self._load_again, instance)
        if loading.future is not None and not loading.future.done():
            if isinstance(frame, frames.Loaded):
                loading.future.set_result(None)
            else:
                loading.future.set_exception(LoadRefused(frame.reason))

    def _load_again(self, instance: Instance) -> None:
        """Try again what was refused when the process came back: the reason may have passed."""
        key = instance.load.instance
        if self.hosted.get(key) is instance and instance.broken and key not in self._loading:
            loading = self._loading[key] = _Loading(instance, None)
            if self._channel is not None:
                self._send_load(loading)


def _cause(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-status).name}"
    return f"signal {-status}"
