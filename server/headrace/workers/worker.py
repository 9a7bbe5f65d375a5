"""What a worker process does: loads models, runs batches, advances streams, one thing at a time."""

import logging
import os
import threading
import traceback
from functools import partial
from pathlib import Path
from time import monotonic_ns

import msgspec

from headrace.core.cpus import usable_cpus
from headrace.core.custom_metric import CustomMetric
from headrace.core.errors import HeadraceError
from headrace.core.fingerprint import fingerprint
from headrace.core.process_memory import give_back, process_memory
from headrace.log import apply
from headrace.workers import frames
from headrace.workers.arena import Segment, mark_begun
from headrace.workers.calls import Calls, OpenCalls
from headrace.workers.channel import close_all
from headrace.workers.conversation import Conversation, ConversationEnded
from headrace.workers.gpu_usage import UNMEASURED, GpuUsage, grown_bytes
from headrace.workers.lookout import Lookout
from headrace.workers.replayed import replay
from headrace.workers.reshaped import Reshaped
from headrace.workers.slot_memory import (
    NOWHERE,
    SlotMemory,
    answer_frames,
    described,
    joint_frames,
    plain_text,
    read_inputs,
)
from headrace.workers.stateful import Stateful
from headrace.workers.streams import Streams
from headrace.workers.warmup import warm_up
from headrace_backends.base import Backend, BackendUnavailable, DeviceLost, LoadError, ModelSource, RequestInfo
from headrace_backends.registry import resolve

log = logging.getLogger("headrace.worker")


class _Model:
    """One loaded instance."""

    __slots__ = ("backend", "calls", "keeps_metrics", "metrics", "name", "signature", "slots", "telling")

    def __init__(self, name: str, backend: Backend, calls: Calls) -> None:
        self.name = name
        self.backend = backend
        self.calls = calls
        self.signature = backend.signature
        self.slots: dict[int, SlotMemory] = {}
        self.keeps_metrics = type(backend).metrics is not Backend.metrics
        self.metrics: tuple[CustomMetric, ...] = ()  # as they were told last
        self.telling = threading.Lock()


class Worker:
    """Serves one conversation until the front process says stop or goes away.

    Frames are dealt with in the order in which they were sent. After each of them, and while there are none, the
    iterators of decoupled requests are advanced, one response at a time.
    """

    def __init__(self, conversation: Conversation, streams: Streams, open_calls: OpenCalls) -> None:
        self._conversation = conversation
        self._streams = streams
        self._open_calls = open_calls
        self._lookout = Lookout(usable_cpus())
        self._models: dict[int, _Model] = {}
        self._loss = streams.loss
        self._attached: dict[int, memoryview] = {}  # other workers' segments, by the front's numbers

    def serve(self) -> None:
        """Work until told to stop."""
        while True:
            idle_ns = monotonic_ns()
            try:
                received = self._conversation.take(lambda: self._streams.runnable, self._lookout.look_ns)
            except ConversationEnded:
                return
            self._lookout.waited(monotonic_ns() - idle_ns)
            if received is not None:
                frame, descriptors = received
                try:
                    if isinstance(frame, frames.Stop):
                        return
                    self._loss.end_if_lost()  # by another thread, meanwhile: whoever comes next takes the frame
                    self._deal_with(frame, descriptors)
                finally:
                    close_all(descriptors)
            if self._streams.runnable:
                self._streams.step()  # also after a frame: under load there is always another one
            self._loss.end_if_lost()

    def close(self) -> None:
        """Close every model."""
        for instance in list(self._models):
            self._unload(instance)

    def _deal_with(self, frame: frames.ToWorker, descriptors: list[int]) -> None:
        if isinstance(frame, frames.Run):
            self._run(frame, descriptors)
            self._lookout.ran(frame.merged)
        elif isinstance(frame, frames.Load):
            self._load(frame)
        elif isinstance(frame, frames.Unload):
            self._unload(frame.instance)
        elif isinstance(frame, frames.Detach):
            self._attached.pop(frame.segment, None)
        elif isinstance(frame, frames.Logging):
            apply(frame.levels)

    def _load(self, frame: frames.Load) -> None:
        started_ns = monotonic_ns()
        calls = Calls(self._conversation, self._open_calls, frame.instance)
        files_print = fingerprint(Path(frame.repository, frame.version))
        try:
            kind = resolve(frame.backend)
            before_bytes = _own_bytes()  # with the framework, which others use as well
            usage = GpuUsage(frame.gpu_uuid) if frame.gpu_uuid else None
            gpu_before = usage.read() if usage is not None else None
            backend = kind.load(_source(frame, calls))
            notes = backend.notes()
            if frame.replay:
                notes = [*notes, replay(backend, Path(frame.replay), frame.tolerance)]
            if frame.reshapes:
                backend = Reshaped(backend, frame.reshapes)
            if frame.sequence is not None:
                backend = Stateful(backend, frame.sequence)
            if frame.warmup and backend.warms_up and not backend.signature.decoupled:
                notes = [*notes, *warm_up(backend)]
        except (LoadError, BackendUnavailable, HeadraceError) as error:
            self._conversation.send(frames.LoadFailed(frame.instance, plain_text(error)))
            self._loss.note(frame.name, error)
        except BaseException as error:  # noqa: BLE001 - a model's own code may raise anything, and may want to exit
            log.error("model %s version %s: %s", frame.name, frame.version, traceback.format_exc())  # noqa: TRY400
            self._conversation.send(frames.LoadFailed(frame.instance, described(error)[1]))
            self._loss.note(frame.name, error)
        else:
            model = self._models[frame.instance] = _Model(frame.name, backend, calls)
            give_back()  # what only the load needed
            seconds = (monotonic_ns() - started_ns) * 1e-9
            gpu_bytes = grown_bytes(gpu_before, usage.read()) if usage is not None else 0
            if usage is not None and usage.why_not:
                notes = [*notes, UNMEASURED.format(why=usage.why_not)]
            self._conversation.send(
                frames.Loaded(
                    frame.instance,
                    model.signature,
                    backend.wants_requests,
                    backend.cpu_threads,
                    tuple(notes),
                    seconds,
                    backend.remembers,
                    max(0, _own_bytes() - before_bytes),
                    gpu_bytes,
                    files_print,
                )
            )
            self._tell_metrics(frame.instance, model)

    def _unload(self, instance: int) -> None:
        model = self._models.pop(instance, None)
        if model is None:
            return
        try:
            model.backend.close()
        except BaseException:  # as in ``_run``
            log.exception("model %s: its unload failed", model.name)
        del model
        give_back()

    def _run(self, frame: frames.Run, descriptors: list[int]) -> None:
        model = self._models[frame.instance]
        slot = model.slots.get(frame.slot)
        if slot is None:
            slot = model.slots[frame.slot] = SlotMemory()
        own = 1 if frame.segment_bytes else 0
        if own:
            slot.inputs = Segment(descriptors[0], frame.segment_bytes).view
        if frame.attached:
            for (number, nbytes), descriptor in zip(frame.attached, descriptors[own:], strict=True):
                self._attached[number] = Segment(descriptor, nbytes, writable=False).view
        mark_begun(slot.inputs, frame.sequence)
        model.calls.on_behalf_of = frame.sequence
        try:
            if model.signature.decoupled:
                self._begin(model, slot, frame)
            else:
                self._execute(model, slot, frame)
        except HeadraceError as error:
            self._conversation.send(frames.Failed(frame.sequence, *described(error)))
        except DeviceLost as error:
            log.error("model %s: %s; this worker ends, to be started again", model.name, error)  # noqa: TRY400
            self._conversation.send(frames.Failed(frame.sequence, *described(error)))
            raise
        except BaseException as error:  # noqa: BLE001 - a model's own code may raise anything: libraries in Rust panic so
            log.error("model %s: %s", model.name, traceback.format_exc())  # noqa: TRY400
            self._conversation.send(frames.Failed(frame.sequence, *described(error)))
            self._loss.note(model.name, error)
        finally:
            model.calls.on_behalf_of = 0
        if model.keeps_metrics:
            self._tell_metrics(frame.instance, model)

    def _execute(self, model: _Model, slot: SlotMemory, frame: frames.Run) -> None:
        started_ns = monotonic_ns()
        whole = self._gather(frame, slot, in_place=model.backend.reads_only) if frame.pieces else NOWHERE
        inputs = read_inputs(model.signature, frame.inputs, slot.inputs, whole)
        requests = [_info(request) for request in frame.requests] if frame.requests else []
        ready_ns = monotonic_ns()
        result = model.backend.execute(inputs, requests)
        executed_ns = monotonic_ns()
        answers: list[frames.AnswerFrame] = []
        outputs: list[frames.TensorFrame] = []
        if isinstance(result, list | tuple):
            answers, buffers = answer_frames(model.signature, result, len(requests))
        else:
            outputs, buffers = joint_frames(model.signature, result)  # type: ignore[arg-type] # the other of the two
        passed = slot.write(buffers)
        try:
            self._conversation.send(
                frames.Done(
                    frame.sequence,
                    tuple(outputs),
                    slot.size.nbytes if passed else 0,
                    ready_ns - started_ns,
                    executed_ns - ready_ns,
                    monotonic_ns() - executed_ns,
                    tuple(answers),
                ),
                passed,
            )
        except BaseException:
            if passed:
                slot.forget_outputs()
            raise
        finally:
            close_all(passed)
        for answer in result if isinstance(result, list | tuple) else ():
            if answer.error is not None:
                self._loss.note(model.name, answer.error)

    def _gather(self, frame: frames.Run, slot: SlotMemory, *, in_place: bool) -> dict[int, memoryview]:
        """Fetch input data from other workers' outputs to where it belongs.

        With ``in_place`` an input that is one whole piece is left where it is, and comes back by its own offset.
        """
        whole: dict[int, memoryview] = {}
        sizes = {tensor.offset: tensor.nbytes for tensor in frame.inputs if tensor is not None}
        for piece in frame.pieces:
            data = self._attached[piece.segment][piece.source : piece.source + piece.nbytes]
            if in_place and sizes.get(piece.offset) == piece.nbytes:
                whole[piece.offset] = data
            else:
                slot.inputs[piece.offset : piece.offset + piece.nbytes] = data
        return whole

    def _begin(self, model: _Model, slot: SlotMemory, frame: frames.Run) -> None:
        """Take a decoupled request out of its slot, which is free then, and have the model begin to answer it."""
        started_ns = monotonic_ns()
        whole = self._gather(frame, slot, in_place=True)
        arrays = read_inputs(model.signature, frame.inputs, slot.inputs, whole)
        kept = {name: array.copy() for name, array in arrays.items()}
        self._conversation.send(frames.Begun(frame.sequence, monotonic_ns() - started_ns))
        request = _info(frame.requests[0])
        tell = partial(self._tell_metrics, frame.instance, model)
        self._streams.begin(model.name, model.backend, model.calls, frame.sequence, request, kept, tell)

    def _tell_metrics(self, instance: int, model: _Model) -> None:
        """Tell the front of the metrics that the model's code keeps, when they have changed. Any thread may."""
        with model.telling:  # so that older values never follow newer ones
            try:
                metrics = tuple(model.backend.metrics())
                if metrics == model.metrics:
                    return
                model.metrics = metrics
                told = frames.encode(frames.CustomMetrics(instance, tuple(map(_plain, metrics))))
                frames.decode_from_worker(told)  # what the front could not read must not reach it
            except Exception:
                log.exception("model %s: its metrics cannot be told", model.name)
                return
            self._conversation.send_encoded(told)


def _own_bytes() -> int:
    memory = process_memory(os.getpid())
    return memory.own_bytes if memory is not None else 0


def _source(frame: frames.Load, calls: Calls) -> ModelSource:
    return ModelSource(
        name=frame.name,
        version=frame.version,
        path=Path(frame.path),
        device=frame.device,
        threads=frame.threads,
        inputs=frame.signature.inputs,
        outputs=frame.signature.outputs,
        max_batch_size=frame.max_batch_size,
        parameters=frame.parameters,
        decoupled=frame.decoupled,
        config_json=frame.config_json,
        repository=frame.repository,
        instance=f"{frame.name}_{frame.instance}",
        calls=calls,
    )


def _plain(one: CustomMetric) -> CustomMetric:
    # A model may have counted with numpy's numbers.
    return msgspec.structs.replace(one, value=float(one.value))


def _info(frame: frames.RequestFrame) -> RequestInfo:
    return RequestInfo(frame.rows, frame.id, frame.parameters, frame.outputs, frame.slot)
