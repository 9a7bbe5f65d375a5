"""Models that call models: what workers ask of the engine and the repository, answered in shared memory."""

import asyncio
import logging
import os
from collections import Counter
from time import monotonic_ns

from headrace.batching.queue_policy import MAX_TIMEOUT_US
from headrace.batching.response_stream import ResponseStream
from headrace.batching.room import Room
from headrace.core.errors import Cancelled, HeadraceError, InternalError, InvalidRequest, Kind, released
from headrace.core.plain_text import plain
from headrace.core.request import InferRequest, InferResponse, Parameters, RequestedOutput
from headrace.core.tensor import DATATYPE_BY_NAME, Buffer, Tensor
from headrace.engine import Engine
from headrace.repository.served_ensemble import ServedEnsemble
from headrace.workers.arena import Segment, aligned
from headrace.workers.frames import (
    CALL_WINDOW,
    CALL_WINDOW_BYTES,
    Ask,
    Call,
    CallAnswer,
    CallCredit,
    CallEnd,
    TensorFrame,
)
from headrace.workers.process import Asked, WorkerProcess

log = logging.getLogger(__name__)

MAX_CALLS = 4096  # of one worker, at once

_Key = tuple[WorkerProcess, int]


class _Streamed:
    """A call that is answered part by part."""

    __slots__ = ("room", "stream", "task")

    def __init__(self, stream: ResponseStream) -> None:
        self.stream = stream
        self.room = Room(CALL_WINDOW, CALL_WINDOW_BYTES)
        self.task: asyncio.Task[None] | None = None


class CallDesk:
    """Answers the calls of every worker. A call fails as a client's request would; nothing of it hurts the server."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._open: dict[_Key, asyncio.Future[InferResponse] | asyncio.Task[None] | _Streamed] = {}
        self._counts: dict[WorkerProcess, int] = {}
        self._edges: dict[_Key, tuple[str, ...]] = {}  # of each open call, who waits for whom
        self._waits: Counter[tuple[str, ...]] = Counter()  # how often each of these is among them

    def take(self, process: WorkerProcess, frame: Asked, descriptors: list[int]) -> None:
        """One more call, or word about one. The descriptors are closed after the call."""
        key = (process, frame.call)
        if isinstance(frame, CallEnd):
            self._cancel(self._forget(key))
        elif isinstance(frame, CallCredit):
            streamed = self._open.get(key)
            if isinstance(streamed, _Streamed):
                streamed.room.give(frame.responses, frame.nbytes)
        else:
            try:
                self._begin(key, frame, descriptors)
            except HeadraceError as error:
                self._refuse(key, error)
            except Exception as failure:  # noqa: BLE001 - whatever goes wrong, the calling model waits for an answer
                self._refuse(key, _unexpected(failure))

    def worker_died(self, process: WorkerProcess) -> None:
        """Nobody waits for the answers to that process's calls any more."""
        for key in [key for key in self._open if key[0] is process]:
            self._cancel(self._forget(key))

    def _begin(self, key: _Key, frame: Call | Ask, descriptors: list[int]) -> None:
        if self._counts.get(key[0], 0) >= MAX_CALLS:
            raise InvalidRequest(f"a model's worker has {MAX_CALLS} calls that are not answered")
        if isinstance(frame, Ask):
            self._keep(key, self._loop.create_task(self._answer_ask(key, frame)))
        else:
            self._run(key, frame, descriptors)

    # -- inference ----------------------------------------------------------------------------------------

    def _run(self, key: _Key, frame: Call, descriptors: list[int]) -> None:
        callers = _callers(key[0], frame)
        request = _request(frame, callers, descriptors)
        if request.model not in callers:  # otherwise it is refused by the engine, which can say by which way it came
            self._check_circle(callers[-1:], request.model)
        if frame.streams:
            streamed = _Streamed(self._engine.stream(request))
            self._keep(key, streamed, (*callers[-1:], request.model))
            streamed.task = self._loop.create_task(self._forward(key, streamed))
            return
        future = self._engine.infer(request)
        self._keep(key, future, (*callers[-1:], request.model))
        future.add_done_callback(lambda done: self._answer(key, done))

    def _answer(self, key: _Key, done: asyncio.Future[InferResponse]) -> None:
        if self._open.get(key) is not done:
            return
        if done.cancelled():
            self._refuse(key, Cancelled("the call was taken back before it was answered"))
            return
        error = done.exception()
        if error is not None:
            self._refuse(key, error)
            return
        try:
            self._respond(key, done.result(), last=True)
        except Exception as failure:  # noqa: BLE001 - as in ``take``
            self._refuse(key, _unexpected(failure))
        else:
            self._forget(key)

    async def _forward(self, key: _Key, streamed: _Streamed) -> None:
        error: Exception | None = None
        try:
            async for item in streamed.stream:
                await streamed.room.wait()
                nbytes = 0
                if isinstance(item, InferResponse):
                    nbytes = self._respond(key, item, last=False)
                else:
                    key[0].tell(CallAnswer(key[1], False, kind=item.kind.value, message=plain(str(item))))
                streamed.room.take(nbytes)
        except Exception as failure:  # noqa: BLE001 - as in ``take``
            error = _unexpected(failure)
        streamed.stream.cancel()  # nothing happens at the end
        if self._open.get(key) is not streamed:
            return
        if error is not None:
            self._refuse(key, error)
        else:
            self._forget(key)
            key[0].tell(CallAnswer(key[1], True))

    def _respond(self, key: _Key, response: InferResponse, *, last: bool) -> int:
        """Tell the calling model of a response; returns the bytes of memory that it lies in."""
        process, call = key
        outputs: list[tuple[str, TensorFrame]] = []
        buffers: list[Buffer] = []
        offset = 0
        for tensor in response.outputs:
            nbytes = len(tensor.data)
            outputs.append((tensor.name, TensorFrame(offset, nbytes, tensor.shape, tensor.datatype)))
            buffers.append(tensor.data)
            offset += aligned(nbytes)
        answer = CallAnswer(call, last, tuple(outputs), response.parameters, offset)
        if not offset:
            process.tell(answer)
            return 0
        segment, descriptor = Segment.create(offset)
        try:
            for (_, frame), buffer in zip(outputs, buffers, strict=True):
                segment.view[frame.offset : frame.offset + frame.nbytes] = buffer
        except BaseException:
            os.close(descriptor)
            raise
        process.tell(answer, [descriptor])
        return offset

    # -- the repository -----------------------------------------------------------------------------------

    async def _answer_ask(self, key: _Key, frame: Ask) -> None:
        error: Exception | None = None
        parameters: Parameters = {}
        try:
            parameters = await self._obey(frame)
        except HeadraceError as refusal:
            error = released(refusal)
        except Exception as failure:  # noqa: BLE001 - as in ``take``
            error = _unexpected(failure)
        if self._open.get(key) is not asyncio.current_task():
            return
        if error is not None:
            self._refuse(key, error)
        else:
            self._forget(key)
            key[0].tell(CallAnswer(key[1], True, parameters=parameters))

    async def _obey(self, frame: Ask) -> Parameters:
        repository = self._engine.repository
        if frame.verb == "is_ready":
            return {"ready": repository.is_ready(frame.model, frame.version)}
        if frame.verb == "load":
            await repository.load(frame.model, frame.config, frame.files)
        else:
            await repository.unload(frame.model, dependents=frame.dependents)
        return {}

    # -- keeping track ------------------------------------------------------------------------------------

    def _check_circle(self, caller: tuple[str, ...], called: str) -> None:
        """Refuse a call of a model that waits, by way of its own calls, for the calling one: both would for ever.

        Raises:
            InvalidRequest: it is one.
        """
        waits: dict[str, set[str]] = {}
        for waiting, *awaited in self._waits:
            waits.setdefault(waiting, set()).update(awaited)
        seen, ahead = set(caller), [called]
        while ahead:
            name = ahead.pop()
            if name in caller:
                raise InvalidRequest(
                    f"model '{called}' is waiting for model '{name}' to answer a call of its own just now: "
                    "models that call each other can wait for ever, so this call is refused"
                )
            if name not in seen:
                seen.add(name)
                ahead += (*waits.get(name, ()), *self._parts(name))

    def _parts(self, name: str) -> list[str]:
        """The models of an ensemble, for which it waits whenever it is waited for."""
        served = self._engine.repository.find(name, "")
        return [planned.step.model for planned in served.plan.steps] if isinstance(served, ServedEnsemble) else []

    def _keep(
        self,
        key: _Key,
        what: "asyncio.Future[InferResponse] | asyncio.Task[None] | _Streamed",
        edge: tuple[str, ...] = (),
    ) -> None:
        if len(edge) > 1:
            self._edges[key] = edge
            self._waits[edge] += 1
        self._open[key] = what
        self._counts[key[0]] = self._counts.get(key[0], 0) + 1

    def _forget(self, key: _Key) -> "asyncio.Future[InferResponse] | asyncio.Task[None] | _Streamed | None":
        edge = self._edges.pop(key, None)
        if edge is not None:
            self._waits[edge] -= 1
            if not self._waits[edge]:
                del self._waits[edge]
        what = self._open.pop(key, None)
        if what is not None:
            self._counts[key[0]] -= 1
            if not self._counts[key[0]]:
                del self._counts[key[0]]
        return what

    @staticmethod
    def _cancel(what: "asyncio.Future[InferResponse] | asyncio.Task[None] | _Streamed | None") -> None:
        if isinstance(what, _Streamed):
            what.stream.cancel()
            if what.task is not None:
                what.task.cancel()
        elif what is not None:
            what.cancel()

    def _refuse(self, key: _Key, error: BaseException) -> None:
        self._forget(key)
        kind = error.kind if isinstance(error, HeadraceError) else Kind.INTERNAL
        key[0].tell(CallAnswer(key[1], True, kind=kind.value, message=plain(str(error))))


def _unexpected(failure: Exception) -> InternalError:
    log.error("a model's call of another model could not be answered", exc_info=failure)
    return InternalError(f"the call could not be answered: {failure}")


def _callers(process: WorkerProcess, frame: Call) -> tuple[str, ...]:
    """The models on whose behalf the call is made, the calling one last."""
    instance = process.hosted.get(frame.instance)
    own = () if instance is None else (instance.load.name,)
    before: dict[str, None] = {}
    for batch in process.unanswered.batches_of(frame.instance, frame.sequence):
        for pending in batch.pending:
            before.update(dict.fromkeys(pending.request.callers))
    return (*before, *own)


def _request(frame: Call, callers: tuple[str, ...], descriptors: list[int]) -> InferRequest:
    """The call as a client's request; its inputs stay in the caller's memory, which is this request's alone."""
    if frame.segment_bytes and not descriptors:
        raise InternalError("the memory of a model's call could not be received; this process is out of descriptors")
    view = memoryview(b"")
    if frame.segment_bytes:
        if os.fstat(descriptors[0]).st_size < frame.segment_bytes:
            raise InternalError("the memory of a model's call is smaller than it says")
        view = Segment(descriptors[0], frame.segment_bytes).view
    inputs = tuple(
        Tensor(
            name, DATATYPE_BY_NAME[tensor.datatype], tensor.shape, view[tensor.offset : tensor.offset + tensor.nbytes]
        )
        for name, tensor in frame.inputs
    )
    deadline_ns = monotonic_ns() + min(frame.timeout_us, MAX_TIMEOUT_US) * 1000 if frame.timeout_us else 0
    outputs = tuple(RequestedOutput(name) for name in frame.outputs)
    return InferRequest(
        frame.model, frame.version, frame.id, inputs, outputs, frame.parameters, deadline_ns, callers, borrows=True
    )
