"""The worker process: loads models and runs batches, one thing at a time, in the order it is asked."""

import ctypes
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from time import monotonic_ns

import numpy as np

from headrace.core.errors import HeadraceError, Kind
from headrace.core.model import Signature
from headrace.core.tensor import Array, datatype_of, from_wire, to_wire
from headrace.log import set_up_logging
from headrace.workers import channel, frames
from headrace.workers.arena import Segment, SegmentSize, aligned, mark_begun
from headrace.workers.frames import TensorFrame
from headrace.workers.warmup import warm_up
from headrace_backends.base import Backend, BackendUnavailable, LoadError, ModelSource, RequestInfo
from headrace_backends.registry import resolve

log = logging.getLogger("headrace.worker")
_PR_SET_PDEATHSIG = 1


class _Slot:
    """The worker's view of a batch's place: inputs in the front's segment, outputs in its own."""

    __slots__ = ("inputs", "outputs", "size")

    def __init__(self) -> None:
        self.inputs = memoryview(b"")
        self.outputs: Segment | None = None
        self.size = SegmentSize()


class _Model:
    """One loaded instance."""

    __slots__ = ("backend", "name", "signature", "slots")

    def __init__(self, name: str, backend: Backend) -> None:
        self.name = name
        self.backend = backend
        self.signature = backend.signature
        self.slots: dict[int, _Slot] = {}


class Worker:
    """Serves one socket until the front process says stop or goes away."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._models: dict[int, _Model] = {}

    def serve(self) -> None:
        """Answer frames until told to stop."""
        while True:
            data, descriptors = channel.receive(self._sock)
            if not data:
                return
            frame = frames.decode_to_worker(data)
            try:
                if isinstance(frame, frames.Run):
                    self._run(frame, descriptors)
                elif isinstance(frame, frames.Load):
                    self._load(frame)
                elif isinstance(frame, frames.Unload):
                    self._unload(frame.instance)
                else:
                    return
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def close(self) -> None:
        """Close every model."""
        for instance in list(self._models):
            self._unload(instance)

    def _load(self, frame: frames.Load) -> None:
        started_ns = monotonic_ns()
        try:
            backend = resolve(frame.backend).load(_source(frame))
            notes = backend.notes()
            if frame.warmup and backend.warms_up:
                notes = [*notes, *warm_up(backend)]
        except (LoadError, BackendUnavailable, HeadraceError) as error:
            self._send(frames.LoadFailed(frame.instance, str(error)))
        except Exception as error:  # noqa: BLE001 - a model's own code may raise anything
            log.error("model %s version %s: %s", frame.name, frame.version, traceback.format_exc())  # noqa: TRY400
            self._send(frames.LoadFailed(frame.instance, f"{type(error).__name__}: {error}"))
        else:
            model = self._models[frame.instance] = _Model(frame.name, backend)
            seconds = (monotonic_ns() - started_ns) * 1e-9
            self._send(
                frames.Loaded(
                    frame.instance, model.signature, backend.wants_requests, backend.cpu_threads, tuple(notes), seconds
                )
            )

    def _unload(self, instance: int) -> None:
        model = self._models.pop(instance, None)
        if model is None:
            return
        try:
            model.backend.close()
        except Exception:
            log.exception("model %s: its unload failed", model.name)

    def _run(self, frame: frames.Run, descriptors: list[int]) -> None:
        model = self._models[frame.instance]
        slot = model.slots.setdefault(frame.slot, _Slot())
        if frame.segment_bytes:
            slot.inputs = Segment(descriptors[0], frame.segment_bytes).view
        mark_begun(slot.inputs, frame.sequence)
        started_ns = monotonic_ns()
        try:
            inputs = _read_inputs(model.signature, frame.inputs, slot.inputs)
            requests = [RequestInfo(request.rows, request.id, request.parameters) for request in frame.requests]
            ready_ns = monotonic_ns()
            outputs = model.backend.execute(inputs, requests)
            executed_ns = monotonic_ns()
            reply, passed = _write_outputs(model.signature, outputs, slot)
        except HeadraceError as error:
            self._send(frames.Failed(frame.sequence, error.kind.value, str(error)))
        except Exception as error:  # noqa: BLE001 - a model's own code may raise anything
            log.error("model %s: %s", model.name, traceback.format_exc())  # noqa: TRY400
            self._send(frames.Failed(frame.sequence, Kind.INTERNAL.value, f"{type(error).__name__}: {error}"))
        else:
            self._send(
                frames.Done(
                    frame.sequence,
                    reply,
                    slot.size.nbytes if passed else 0,
                    ready_ns - started_ns,
                    executed_ns - ready_ns,
                    monotonic_ns() - executed_ns,
                ),
                passed,
            )
            for descriptor in passed:
                os.close(descriptor)

    def _send(self, frame: frames.FromWorker, descriptors: list[int] | None = None) -> None:
        channel.send_blocking(self._sock, frames.encode(frame), descriptors or ())


def _source(frame: frames.Load) -> ModelSource:
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
    )


def _read_inputs(
    signature: Signature, tensors: tuple[TensorFrame | None, ...], segment: memoryview
) -> dict[str, Array]:
    """The batch's inputs as arrays over the segment; BYTES are made into objects."""
    inputs: dict[str, Array] = {}
    for spec, tensor in zip(signature.inputs, tensors, strict=True):
        if tensor is not None:
            data = segment[tensor.offset : tensor.offset + tensor.nbytes]
            inputs[spec.name] = from_wire(data, spec.datatype, tensor.shape)
    return inputs


def _write_outputs(
    signature: Signature, outputs: Mapping[str, Array], slot: _Slot
) -> tuple[tuple[TensorFrame, ...], list[int]]:
    """Copy the outputs into the slot's segment; a descriptor comes back when the segment is a new one."""
    tensors: list[TensorFrame] = []
    buffers = []
    offset = 0
    for spec in signature.outputs:
        array = outputs[spec.name]
        datatype = datatype_of(array)
        if datatype is None:
            raise TypeError(f"output '{spec.name}' has numpy dtype {array.dtype}, which the protocol does not have")
        if datatype is not spec.datatype:
            raise TypeError(f"output '{spec.name}' has datatype {datatype}, expected {spec.datatype}")
        data = to_wire(array)
        tensors.append(TensorFrame(offset, len(data), tuple(array.shape), str(datatype)))
        buffers.append(data)
        offset += aligned(len(data))
    descriptors: list[int] = []
    segment_bytes = slot.size.fit(max(offset, 1))
    if segment_bytes:
        slot.outputs, descriptor = Segment.create(segment_bytes)
        descriptors.append(descriptor)
    assert slot.outputs is not None, "the first batch made a segment"
    view = slot.outputs.view
    for tensor, data in zip(tensors, buffers, strict=True):
        view[tensor.offset : tensor.offset + tensor.nbytes] = data
    return tuple(tensors), descriptors


def _die_with_parent() -> None:
    """Have the kernel end this process when the front process ends, however that comes about."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Entry point: ``python -m headrace.workers.main DESCRIPTOR NAME LOG_FORMAT``."""
    _die_with_parent()
    # Ctrl-C and service managers signal the whole group; when to stop is the front process's to say. A handler
    # rather than SIG_IGN, because programs that a model starts would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    descriptor, name, log_format = sys.argv[1:]
    set_up_logging(log_format, "info", name)
    sock = socket.socket(fileno=int(descriptor))
    os.set_inheritable(sock.fileno(), False)
    np.seterr(all="ignore")
    worker = Worker(sock)
    try:
        worker.serve()
    except (ConnectionResetError, BrokenPipeError):
        pass  # the front process is gone
    finally:
        worker.close()


if __name__ == "__main__":
    main()
