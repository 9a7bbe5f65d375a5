"""One worker process and the instances that it hosts, brought back whenever it dies."""

import asyncio
import contextlib
import logging
import os
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
from headrace.workers.loads import Loading, LoadRefused, Loads
from headrace.workers.numa import Node
from headrace.workers.restarts import Restarts, backoff_s
from headrace.workers.spawn import cause_of_end, spawn
from headrace.workers.unanswered import Unanswered, load_key

log = logging.getLogger(__name__)

RELOAD_AFTER_S = 5.0
Asked = frames.Call | frames.CallEnd | frames.CallCredit | frames.Ask


class CallDesk(Protocol):
    """Where the calls go that a worker's models make of other models, and of the repository."""

    def take(self, process: "WorkerProcess", frame: Asked, descriptors: list[int]) -> None:
        """One more call, or word about one. The descriptors are closed after the call."""

    def worker_died(self, process: "WorkerProcess") -> None:
        """Nobody waits for the answers to that process's calls any more."""


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
        self._loads = Loads()
        self._restarts = Restarts()
        self._pause_s = 0.0  # before the next life
        self._up_at = 0.0  # when its first load was answered in this life; 0 while none was
        self.unanswered = Unanswered()  # in this life
        self._levels: LogLevels | None = None
        self.attachments = Attachments(self._detach)
        self._desk = desk  # where its models' calls of other models go
        self._sequence = 0
        self._kill_cause = ""
        self._timed_out = False
        self._stopping = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._keep_alive())
        self._task.add_done_callback(self._on_end)

    @property
    def pid(self) -> int | None:
        """The process now, if there is one."""
        return self._process.pid if self._process is not None else None

    @property
    def is_loading(self) -> bool:
        """Whether a model is being loaded, or is to be."""
        return bool(self._loads)

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
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        loading = self._loads.add(instance, answer)
        if self._channel is not None:
            self._send_load(loading)
        try:
            await answer
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
        self._loads.drop(instance)
        self._restarts.forget(instance.load.instance)
        if self.hosted.pop(instance.load.instance, None) is not None and self._channel is not None:
            self._channel.send(frames.encode(frames.Unload(instance.load.instance)))

    async def stop(self, grace_s: float = 5.0) -> None:
        """End the process: by request, and by force when it does not follow."""
        self._stopping.set()
        if isinstance(self.unanswered.head, Loading):
            self.kill("stopped while it loaded a model")
        elif self._channel is not None:
            self._channel.send(frames.encode(frames.Stop()))
        _, unfinished = await asyncio.wait([self._task], timeout=grace_s)
        if unfinished:
            self.kill("did not stop when asked to")
            await asyncio.wait([self._task])

    async def end(self, cause: str) -> None:
        """End the process at once, for good: what it was at fails or runs elsewhere, as when it dies."""
        self._stopping.set()
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
        if self.unanswered.head is None:
            cause = self.unanswered.silent(now, self.hosted.values())
        else:
            cause = self.unanswered.overdue(now, load_timeout_s)
            self._timed_out = self._timed_out or bool(cause)
        if cause:
            self.kill(cause)

    # -- what the instances ask ---------------------------------------------------------------------------

    def next_sequence(self) -> int:
        """A number for the next batch."""
        self._sequence += 1
        return self._sequence

    def run(self, batch: Batch, frame: frames.Run, descriptors: list[int]) -> None:
        """Have the worker run this batch."""
        assert self._channel is not None, "nothing is sent while the process is down"
        self._channel.send(frames.encode(frame), descriptors)
        self.unanswered.add(frame.sequence, batch)

    def tell(self, frame: frames.ToWorker, descriptors: Sequence[int] = ()) -> None:
        """Send the worker what is not answered; the descriptors are taken over. Nothing is sent while it is down."""
        try:
            data = frames.encode(frame)
            if self._channel is not None:
                self._channel.send(data, descriptors)
                return
        except BaseException:
            channel.close_all(descriptors)
            raise
        channel.close_all(descriptors)

    def _detach(self, segment: int) -> None:
        self.tell(frames.Detach(segment))

    # -- what the worker says -----------------------------------------------------------------------------

    def _on_frame(self, data: bytes, descriptors: list[int]) -> None:
        try:
            try:
                frame = frames.decode_from_worker(data)
            except msgspec.MsgspecError:
                log.exception("worker %s sent a frame that cannot be read", self.name)
                self.kill("it sent a frame that cannot be read")
                return
            self.unanswered.heard_at = monotonic()
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
        batch = self.unanswered.answered(frame.sequence)
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
        begun = self.unanswered.begun
        if isinstance(frame, frames.Begun):
            batch = self.unanswered.answered(frame.sequence)
            assert isinstance(batch, Batch)
            begun[frame.sequence] = batch
            batch.instance.begun(batch, frame)
            return
        batch_begun = begun.get(frame.sequence)
        if batch_begun is None:
            return  # a thread of a model that has said its last word
        if isinstance(frame, frames.Part):
            batch_begun.instance.part(frame)
        else:
            del begun[frame.sequence]
            batch_begun.instance.ended(frame)

    def _on_metrics(self, frame: frames.CustomMetrics) -> None:
        instance = self.hosted.get(frame.instance)
        if instance is not None:
            instance.custom_metrics = frame.samples

    def _on_load_answer(self, frame: frames.Loaded | frames.LoadFailed) -> None:
        self.unanswered.answered(load_key(frame.instance))
        self._up_at = self._up_at or monotonic()
        loading = self._loads.answered(frame.instance)
        if loading is None:
            return  # unloaded meanwhile
        instance = loading.instance
        if isinstance(frame, frames.Loaded):
            instance.up(self, frame)
            if not instance.broken:
                instance.start()
            loading.succeed()
            return
        if loading.future is None:
            instance.break_down(frame.reason)
            asyncio.get_running_loop().call_later(RELOAD_AFTER_S, self._load_again, instance)
        loading.refuse(frame.reason)

    def _send_load(self, loading: Loading) -> None:
        assert self._channel is not None, "nothing is sent while the process is down"
        load = loading.instance.load
        self.unanswered.add(load_key(load.instance), loading)
        try:
            self._channel.send(frames.encode(load))
        except OSError as error:  # this process is out of descriptors or memory, now
            self.kill(f"a model could not be handed to it: {error}")

    def _load_again(self, instance: Instance) -> None:
        """Try again what was refused or left out when the process came back: the reason may have passed."""
        wanted = self.hosted.get(instance.load.instance) is instance and not instance.is_up
        if wanted and instance not in self._loads:
            loading = self._loads.add(instance)
            if self._channel is not None:
                self._send_load(loading)

    # -- the process's lives ------------------------------------------------------------------------------

    async def _keep_alive(self) -> None:
        while not self._stopping.is_set():
            await self._rest(max(backoff_s(self._loads.failures), self._pause_s))
            if self._stopping.is_set():
                return
            try:
                exited = self._spawn()
            except OSError as error:
                self._note_no_process(error)
                continue
            if self._levels is not None:
                self.tell(frames.Logging(self._levels))
            for loading in self._loads:
                self._send_load(loading)
            await exited
            self._bury()

    async def _rest(self, seconds: float) -> None:
        """Return after so long, or when the process is to be stopped."""
        if seconds <= 0.0:
            await asyncio.sleep(0)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

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
        self._up_at = self._pause_s = 0.0
        return spawned.exited

    def _note_no_process(self, error: OSError) -> None:
        """The system gives no process now."""
        log.error("cannot start worker %s: %s", self.name, error)
        now, reason = monotonic(), f"cannot start a worker process: {error}"
        self._loads.start_failed(now)
        self._loads.refuse_all(reason)
        if self._loads.is_hopeless(now):
            self._tell_all(f"{reason}; it goes on trying")

    def _tell_all(self, reason: str) -> None:
        """Those who wait for a model that was up before are to wait no longer."""
        for instance in self.hosted.values():
            if instance.loaded is not None:
                instance.break_down(reason)

    def _bury(self) -> None:
        """The process has ended: take what it still said, then see to what it left undone."""
        assert self._process is not None
        assert self._channel is not None
        self._channel.read()
        self._channel.close()
        self._channel = None
        cause = self._kill_cause or cause_of_end(self._process.wait())
        self._process = None
        unanswered = self.unanswered.clear()
        if self._desk is not None:
            self._desk.worker_died(self)
        if unanswered or not self._stopping.is_set():
            log.warning("worker %s died: %s", self.name, cause)
        at_fault = unanswered[0] if unanswered else None
        if isinstance(at_fault, Batch) and not at_fault.begun:
            at_fault = None  # it lay in the socket of a process that was dead or waking up
        if isinstance(at_fault, Loading):
            self._blame(at_fault, cause)
        for instance in self.hosted.values():
            batches = [one for one in unanswered if isinstance(one, Batch) and one.instance is instance]
            executing = batches.pop(0) if batches and batches[0] is at_fault else None
            if instance.is_up or batches or executing is not None or len(instance.streams):
                instance.down(executing, batches, cause)
        if not (isinstance(at_fault, Loading) or self._stopping.is_set()):
            self._leave_alone(at_fault, cause)
        self._loads.bring_back(self.hosted.values())

    def _leave_alone(self, at_fault: Batch | None, cause: str) -> None:
        """The process died after it had got ready: what does so again and again is not brought back at once.

        That is the model of the batch that it was at, so that the others come back, or else the whole process.
        """
        now, instance = monotonic(), at_fault.instance if at_fault is not None else None
        if instance is not None and len(self.hosted) > 1 and self.hosted.get(instance.load.instance) is instance:
            left = [instance]
            up_at, used = instance.up_at_ns * 1e-9, instance.used_at_ns > instance.up_at_ns
            pause = self._restarts.died(instance.load.instance, cause, up_at, now, used=used)
            if pause.seconds:
                self._loads.leave_out(instance)
                asyncio.get_running_loop().call_later(pause.seconds, self._load_again, instance)
        else:
            left = list(self.hosted.values())
            up_at, used = self._up_at or now, self.used_at_ns * 1e-9 > self._up_at > 0.0
            pause = self._restarts.died(None, cause, up_at, now, used=used)
            self._pause_s = pause.seconds
        if pause.seconds:
            log.warning("worker %s: %s", self.name, pause.reason)
            for one in left:
                one.leave_alone(pause)

    def _blame(self, loading: Loading, cause: str) -> None:
        """The process died at this load."""
        hopeless = self._loads.died(loading, cause, monotonic(), timed_out=self._timed_out)
        if hopeless:
            self._tell_all(hopeless)
        instance = loading.instance
        pause_s = self._loads.put_off(loading, timed_out=self._timed_out) if len(self.hosted) > 1 else 0.0
        if pause_s:
            instance.break_down(
                f"the worker died while it loaded the model: {cause}; so that its other models come back, it is tried "
                f"again in {pause_s:g} s"
            )
            asyncio.get_running_loop().call_later(pause_s, self._load_again, instance)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """Nobody looks after the process any more: as wished, or because of a bug, which must not hang anybody."""
        if task.cancelled() or task.exception() is None:
            return
        log.critical("worker %s is given up", self.name, exc_info=task.exception())
        self.leaving = True
        self.kill("it is not looked after any more")
        for instance in self.hosted.values():
            instance.break_down("its worker process was given up; the server's log says why")
        self._loads.refuse_all("its worker process was given up")
