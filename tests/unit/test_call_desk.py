"""Models' calls of other models, as the front process answers them."""

import asyncio
import gc
import os
from functools import partial
from pathlib import Path
from time import monotonic_ns
from types import SimpleNamespace

import pytest

from headrace.batching.response_stream import ResponseStream
from headrace.calls import MAX_CALLS, CallDesk
from headrace.core.errors import Forbidden, InvalidRequest, NotFound, Overloaded
from headrace.core.request import InferRequest, InferResponse, RequestedOutput
from headrace.core.tensor import DataType, Tensor
from headrace.repository.served_ensemble import ServedEnsemble
from headrace.workers.arena import Segment
from headrace.workers.frames import (
    CALL_WINDOW,
    CALL_WINDOW_BYTES,
    Ask,
    Call,
    CallAnswer,
    CallCredit,
    CallEnd,
    TensorFrame,
    encode,
)


class Process:
    """A worker process that keeps what it is told."""

    def __init__(self):
        self.hosted = {3: SimpleNamespace(load=SimpleNamespace(name="caller"))}
        self.batches = {}
        self.told = []
        self.refuses = None
        self.unanswered = SimpleNamespace(batches_of=self._batches_of)

    def _batches_of(self, instance, sequence):
        return self.batches.get((instance, sequence), [])

    def tell(self, frame, descriptors=()):
        encode(frame)
        if self.refuses is not None and not frame.kind:
            for descriptor in descriptors:
                os.close(descriptor)
            raise self.refuses
        outputs = {}
        if descriptors:
            segment = Segment(descriptors[0], frame.segment_bytes)
            os.close(descriptors[0])
        for name, tensor in frame.outputs:
            outputs[name] = bytes(segment.view[tensor.offset : tensor.offset + tensor.nbytes]) if tensor.nbytes else b""
        self.told.append((frame, outputs))

    @property
    def frames(self):
        return [frame for frame, _ in self.told]


class Repository:
    def __init__(self):
        self.asked = []
        self.change = None
        self.serving = {}

    def find(self, model, version):
        return self.serving.get((model, version))

    def is_ready(self, model, version):
        self.asked.append(("is_ready", model, version))
        if self.change is not None:
            self.change()
        return model == "other"

    async def load(self, model, config, files):
        self.asked.append(("load", model, config, files))
        await self.change()

    async def unload(self, model, *, dependents):
        self.asked.append(("unload", model, dependents))
        await self.change()


class Engine:
    """Accepts everything and keeps it; the test answers."""

    def __init__(self):
        self.repository = Repository()
        self.asked = []
        self.futures = []
        self.streams = []
        self.error = None

    def infer(self, request):
        self._accept(request)
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]

    def stream(self, request):
        self._accept(request)
        stream = ResponseStream(decoupled=True)
        stream.cancelled = 0

        def on_cancel():
            stream.cancelled += 1

        stream.on_cancel = on_cancel
        self.streams.append(stream)
        return stream

    def _accept(self, request):
        if self.error is not None:
            raise self.error
        self.asked.append(request)


def batch(*callers):
    """One of the calling model's, of a request that those before it have made."""
    return SimpleNamespace(pending=[SimpleNamespace(request=InferRequest("caller", "", "", (), callers=callers))])


class Desk:
    """A desk, its engine and a worker that calls."""

    def __init__(self):
        self.engine = Engine()
        self.desk = CallDesk(self.engine)
        self.process = Process()

    def take(self, frame, data=b""):
        """A frame comes, with memory that holds ``data``."""
        descriptors = []
        if data:
            segment, descriptor = Segment.create(len(data))
            segment.view[:] = data
            descriptors.append(descriptor)
        self.desk.take(self.process, frame, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def call(self, number=1, streams=False, **more):
        """A call of the model "other" with one input."""
        values = {
            "instance": 3,
            "sequence": 0,
            "model": "other",
            "version": "",
            "inputs": (("x", TensorFrame(64, 2, (2,), "UINT8")),),
            "outputs": ("y",),
            "id": "id-1",
            "parameters": {"k": 1},
            "timeout_us": 0,
            "segment_bytes": 128,
        }
        data = more.pop("data", b"\0" * 64 + b"\5\6" + b"\0" * 62)
        self.take(Call(call=number, streams=streams, **{**values, **more}), data)

    @property
    def idle(self):
        desk = self.desk
        return not (desk._open or desk._counts or desk._edges or desk._waits)


def response(value=7, **parameters):
    y = Tensor("y", DataType.UINT8, (1,), bytes([value]))
    return InferResponse("other", "1", "id-1", (y, Tensor("none", DataType.UINT8, (0,), b"")), parameters)


def big(nbytes):
    """A response of so many bytes, of which the first is all that is looked at."""
    return InferResponse("other", "1", "id-1", (Tensor("y", DataType.UINT8, (nbytes,), bytes(nbytes)),))


def plain_call(number, instance, model):
    """A call without inputs."""
    return Call(number, instance, 0, model, "", (), (), "", {}, 0, False, 0)


def ensemble(*models):
    """A served ensemble, as far as the desk looks at it."""
    made = object.__new__(ServedEnsemble)
    made.plan = SimpleNamespace(steps=[SimpleNamespace(step=SimpleNamespace(model=model)) for model in models])
    return made


async def settle():
    for _ in range(6):
        await asyncio.sleep(0)


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def leaked(before):
    """How many descriptors more than ``before`` are open that no garbage holds."""
    if open_descriptors() > before:
        gc.collect()
    return max(0, open_descriptors() - before)


@pytest.fixture
async def desk(caplog):
    before = open_descriptors()
    reported = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    made = Desk()
    yield made
    made.desk.worker_died(made.process)
    await settle()
    assert made.idle
    made.engine = made.process = made.desk = None
    caplog.get_records("call").clear()  # tracebacks, which hold on to memory
    assert leaked(before) == 0
    assert reported == []


# ---- one answer ----


async def test_a_call_is_a_request_as_any_other(desk):
    before_ns = monotonic_ns()
    desk.process.batches[3, 9] = [batch("e"), batch()]
    desk.call(sequence=9, version="2", timeout_us=1_000_000)
    (request,) = desk.engine.asked
    assert (request.model, request.version, request.id, request.parameters) == ("other", "2", "id-1", {"k": 1})
    assert request.outputs == (RequestedOutput("y"),)
    assert request.callers == ("e", "caller")
    assert request.borrows
    assert before_ns < request.deadline_ns - 1_000_000_000 <= monotonic_ns()
    (x,) = request.inputs
    assert (x.name, x.datatype, x.shape, bytes(x.data)) == ("x", DataType.UINT8, (2,), b"\5\6")


async def test_it_is_answered_in_memory_of_its_own(desk):
    desk.call()
    desk.engine.futures[0].set_result(response(7, took=3))
    await settle()
    ((frame, outputs),) = desk.process.told
    assert (frame.call, frame.last, frame.kind, frame.parameters) == (1, True, "", {"took": 3})
    assert outputs == {"y": b"\7", "none": b""}
    assert desk.idle


@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize(("error_class", "kind"), [(NotFound, "not_found"), (ZeroDivisionError, "internal")])
async def test_an_error_is_an_answer(desk, error_class, kind, when):
    error = error_class("no such model")
    if when == "at once":
        desk.engine.error = error
        desk.call()
    else:
        desk.call()
        desk.engine.futures[0].set_exception(error)
    await settle()
    (frame,) = desk.process.frames
    assert (frame.call, frame.last, frame.kind) == (1, True, kind)
    assert "no such model" in frame.message
    assert desk.idle
    error.__traceback__ = None


async def test_whoever_takes_a_request_back_the_model_is_told(desk):
    desk.call()
    desk.engine.futures[0].cancel()
    await settle()
    (frame,) = desk.process.frames
    assert (frame.last, frame.kind) == (True, "cancelled")
    assert desk.idle


async def test_an_answer_for_which_there_is_no_memory_is_an_error(desk, monkeypatch):
    desk.call()

    def refuse(nbytes):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Segment, "create", refuse)
        desk.engine.futures[0].set_result(response())
        await settle()
    (frame,) = desk.process.frames
    assert (frame.last, frame.kind) == (True, "internal")
    assert "Too many open files" in frame.message
    assert desk.idle


async def test_an_answer_that_cannot_be_told_is_one_too(desk):
    desk.call()
    desk.process.refuses = OverflowError("too large an integer")
    desk.engine.futures[0].set_result(response())
    await settle()
    (frame,) = desk.process.frames
    assert (frame.last, frame.kind) == (True, "internal")
    assert desk.idle


async def test_memory_that_does_not_come_or_is_too_small_is_an_error(desk):
    desk.call(1, data=b"")
    desk.call(2, data=b"\0" * 64)
    assert [(frame.call, frame.kind) for frame in desk.process.frames] == [(1, "internal"), (2, "internal")]
    assert desk.idle
    assert desk.engine.asked == []


async def test_a_worker_has_so_many_calls_and_no_more(desk):
    for number in range(MAX_CALLS):
        desk.call(number, inputs=(), segment_bytes=0, data=b"")
    desk.call(MAX_CALLS)
    (frame,) = desk.process.frames
    assert (frame.call, frame.kind) == (MAX_CALLS, "invalid")
    other = Process()
    desk.desk.take(other, Ask(1, "is_ready", "other"), [])
    await settle()
    assert other.frames == [CallAnswer(1, True, parameters={"ready": True})]
    desk.engine.futures[0].set_result(response())
    await settle()
    desk.call(MAX_CALLS + 1)
    assert len(desk.engine.asked) == MAX_CALLS + 1


async def test_when_the_worker_dies_its_calls_are_taken_back_and_nobody_is_told(desk):
    desk.call(1)
    desk.call(2, streams=True)
    desk.engine.repository.change = asyncio.Event().wait
    desk.take(Ask(3, "load", "other"))
    await settle()
    other = Process()
    desk.desk.take(other, Ask(1, "load", "other"), [])
    await settle()
    desk.desk.worker_died(desk.process)
    await settle()
    assert desk.engine.futures[0].cancelled()
    assert desk.engine.streams[0].cancelled == 1
    assert desk.process.told == []
    assert len(desk.desk._open) == 1, "the other worker's are none of it"
    desk.desk.worker_died(other)
    await settle()
    assert desk.idle


async def test_what_is_left_of_a_call_does_not_answer_the_next_life_of_the_worker(desk):
    """A worker counts its calls from 1 again when it comes back."""
    going_on = asyncio.Event()

    async def stubborn():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await going_on.wait()
            raise Forbidden("not under these settings") from None

    desk.engine.repository.change = stubborn
    desk.take(Ask(1, "load", "other"))
    desk.call(2)
    await settle()
    desk.desk.worker_died(desk.process)
    desk.call(1)
    desk.call(2)
    going_on.set()
    await settle()
    assert desk.process.told == []
    for future in desk.engine.futures[1:]:
        future.set_result(response())
    await settle()
    assert [(frame.call, frame.kind) for frame in desk.process.frames] == [(1, ""), (2, "")]


async def test_a_reason_that_names_a_file_which_is_not_utf_8_is_told_all_the_same(desk):
    """The calling model would else wait for ever."""

    async def fail():
        raise InvalidRequest("has several model files (a.onnx, b\udcff.onnx)")

    desk.engine.repository.change = fail
    desk.take(Ask(1, "load", "other"))
    await settle()
    assert refusals(desk) == {1: ("invalid", "has several model files (a.onnx, b?.onnx)")}


async def test_a_call_of_which_the_batch_is_not_known_is_on_behalf_of_all_that_the_model_is_at(desk):
    desk.process.batches[3, 0] = [batch("e"), batch("d", "e"), batch()]
    desk.call()
    (request,) = desk.engine.asked
    assert request.callers == ("e", "d", "caller")


# ---- models that wait for each other ----


def caller(desk, instance, name):
    """One more model in the worker, that calls."""
    desk.process.hosted[instance] = SimpleNamespace(load=SimpleNamespace(name=name))


def refusals(desk):
    """The calls that were refused, and what was said."""
    return {frame.call: (frame.kind, frame.message) for frame in desk.process.frames if frame.kind}


@pytest.mark.parametrize("streams", [False, True])
async def test_a_model_that_waits_for_the_calling_one_is_not_called(desk, streams):
    caller(desk, 4, "other")
    desk.call(1, streams=streams)
    desk.call(2, instance=4, model="caller", streams=streams)
    kind, said = refusals(desk).pop(2)
    assert kind == "invalid"
    assert said.startswith("model 'caller' is waiting for model 'other' to answer a call of its own just now: ")
    assert not refusals(desk).keys() - {2}
    assert [request.model for request in desk.engine.asked] == ["other"]
    assert len(desk.desk._open) == 1, "the first one goes on"


async def test_nor_one_that_waits_for_it_by_way_of_others_in_whichever_worker(desk):
    other = Process()
    other.hosted = {
        number: SimpleNamespace(load=SimpleNamespace(name=name)) for number, name in enumerate("bcd", start=5)
    }
    ask = partial(desk.desk.take, other, descriptors=[])
    desk.call(1, model="b")
    desk.call(2, model="x")
    ask(plain_call(1, 5, "c"))
    ask(plain_call(2, 5, "y"))
    ask(plain_call(3, 6, "d"))
    ask(plain_call(4, 7, "x"))
    assert not refusals(desk)
    assert other.frames == []
    ask(plain_call(5, 7, "caller"))
    (frame,) = other.frames
    assert (frame.call, frame.kind) == (5, "invalid")
    assert "model 'caller' is waiting for model 'd'" in frame.message
    desk.desk.worker_died(other)


@pytest.mark.parametrize("way", ["answer", "error", "taken back", "death"])
async def test_a_call_that_is_over_is_waited_for_by_nobody(desk, way):
    other = Process()
    other.hosted = {9: SimpleNamespace(load=SimpleNamespace(name="other"))}
    desk.call(1)
    desk.call(2)
    if way == "answer":
        for future in desk.engine.futures:
            future.set_result(response())
    elif way == "error":
        for future in desk.engine.futures:
            future.set_exception(NotFound("no such model"))
    elif way == "taken back":
        desk.take(CallEnd(1))
        desk.take(CallEnd(2))
    else:
        desk.desk.worker_died(desk.process)
    await settle()
    desk.desk.take(other, plain_call(1, 9, "caller"), [])
    assert other.frames == []
    assert desk.engine.asked[-1].model == "caller"
    desk.desk.worker_died(other)


async def test_one_that_comes_back_to_its_caller_is_left_to_the_engine_to_refuse(desk):
    """Which knows the whole way that it came."""
    caller(desk, 4, "other")
    desk.process.batches[4, 0] = [batch("caller")]
    desk.call(1)
    desk.call(2, instance=4, model="caller")
    desk.call(3, model="caller")
    assert not refusals(desk)
    assert [request.callers for request in desk.engine.asked[1:]] == [("caller", "other"), ("caller",)]


async def test_of_two_calls_of_the_same_the_last_one_counts_too(desk):
    caller(desk, 4, "other")
    desk.call(1)
    desk.call(2)
    desk.take(CallEnd(1))
    desk.call(3, instance=4, model="caller")
    assert list(refusals(desk)) == [3]
    desk.take(CallEnd(2))
    desk.call(4, instance=4, model="caller")
    assert list(refusals(desk)) == [3]


async def test_a_call_that_was_not_accepted_is_waited_for_by_nobody(desk):
    caller(desk, 4, "other")
    desk.engine.error = Overloaded("the queue is full")
    desk.call(1)
    desk.engine.error = None
    desk.call(2, instance=4, model="caller")
    assert list(refusals(desk)) == [1]


async def test_an_ensemble_waits_for_its_steps_and_they_for_whom_they_call(desk):
    """The calling model is a step of the called ensemble, or waited for by one."""
    desk.engine.repository.serving["outer", ""] = ensemble("inner", "first")
    desk.engine.repository.serving["inner", ""] = ensemble("second")
    caller(desk, 4, "second")
    desk.call(1, model="outer")
    assert not refusals(desk), "its steps wait for nobody"
    desk.call(2, instance=4, model="outer")
    assert "model 'outer' is waiting for model 'second'" in refusals(desk)[2][1]
    desk.call(3, instance=4, model="caller")
    assert list(refusals(desk)) == [2, 3], "the caller waits for it by way of both ensembles"


async def test_models_that_wait_in_a_circle_of_others_do_not_hold_up_the_desk(desk):
    """A circle that was there before this could be seen: a step was added to an ensemble meanwhile."""
    desk.engine.repository.serving["e", ""] = ensemble("f")
    desk.engine.repository.serving["f", ""] = ensemble("e")
    desk.call(1, model="e")
    assert not refusals(desk)
    assert len(desk.engine.asked) == 1


async def test_asking_the_repository_is_no_waiting_for_a_model(desk):
    caller(desk, 4, "other")
    desk.engine.repository.change = asyncio.Event().wait
    desk.take(Ask(1, "load", "other"))
    desk.call(2, instance=4, model="caller")
    assert not refusals(desk)


# ---- any number of answers ----


async def test_a_streamed_call_is_answered_part_by_part_and_ended(desk):
    desk.call(streams=True)
    (stream,) = desk.engine.streams
    await settle()
    stream.put(response(5))
    stream.put(Overloaded("not now"))
    stream.put(InferResponse("other", "1", "", ()))
    stream.end()
    await settle()
    first, error, empty, last = desk.process.frames
    assert (first.last, error.last, empty.last, last.last) == (False, False, False, True)
    assert desk.process.told[0][1]["y"] == b"\5"
    assert (error.kind, error.message) == ("overloaded", "not now")
    assert last == CallAnswer(1, True)
    assert desk.idle
    assert stream.cancelled == 0


async def test_no_more_is_under_way_than_the_model_has_room_for(desk):
    desk.call(streams=True)
    (stream,) = desk.engine.streams
    for _ in range(3 * CALL_WINDOW):
        stream.put(response())
    await asyncio.sleep(0)
    for _ in range(3 * CALL_WINDOW):
        await asyncio.sleep(0)
    assert len(desk.process.told) == CALL_WINDOW
    desk.take(CallCredit(1, 5, 5 * 64))
    for _ in range(3 * CALL_WINDOW):
        await asyncio.sleep(0)
    assert len(desk.process.told) == CALL_WINDOW + 5
    desk.take(CallEnd(1))
    await settle()
    assert stream.cancelled == 1
    assert len(desk.process.told) == CALL_WINDOW + 5
    assert desk.idle


async def test_nor_than_it_has_room_for_in_bytes(desk):
    """Counted as the memory that they lie in; an error takes none."""

    async def told(count):
        for _ in range(30):
            await asyncio.sleep(0)
        assert len(desk.process.told) == count

    desk.call(streams=True)
    (stream,) = desk.engine.streams
    half = CALL_WINDOW_BYTES // 2
    for item in (
        big(half - 64),
        response(),
        big(half),
        Overloaded("no"),
        big(3 * CALL_WINDOW_BYTES),
        response(),
        response(),
    ):
        stream.put(item)
    await told(3)
    desk.take(CallCredit(1, 1, half - 64))
    await told(5)  # the error, and one that is larger than the window, because there is room for something
    desk.take(CallCredit(1, 3, half + 64))
    await told(5)
    desk.take(CallCredit(1, 1, 3 * CALL_WINDOW_BYTES))
    await told(7)
    assert desk.desk._open[desk.process, 1].room._ahead_bytes == 128
    desk.take(CallCredit(1, 2, 128))
    stream.end()
    await settle()
    assert desk.idle


@pytest.mark.parametrize("started", [False, True])
async def test_a_call_that_the_model_takes_back_is_over_also_when_it_has_hardly_begun(desk, started):
    desk.call(streams=True)
    if started:
        await settle()
    desk.take(CallEnd(1))
    desk.take(CallEnd(1))
    await settle()
    assert desk.engine.streams[0].cancelled == 1
    assert desk.process.told == []
    assert desk.idle


@pytest.mark.parametrize("how", ["memory", "telling", "iterating"])
async def test_whatever_goes_wrong_with_a_response_the_call_ends_with_an_error(desk, monkeypatch, how):
    desk.call(streams=True)
    (stream,) = desk.engine.streams
    await settle()

    def refuse(*_):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        if how == "memory":
            patch.setattr(Segment, "create", refuse)
        elif how == "telling":
            desk.process.refuses = OverflowError("too large an integer")
        else:
            stream.on_room = refuse
            for _ in range(CALL_WINDOW - 1):
                stream.put(response())
        stream.put(response())
        for _ in range(2 * CALL_WINDOW):
            await asyncio.sleep(0)
    last = desk.process.frames[-1]
    assert (last.call, last.last, last.kind) == (1, True, "internal")
    assert stream.cancelled == 1
    assert desk.idle


async def test_word_about_calls_that_nobody_knows_is_nothing(desk):
    desk.take(CallEnd(77))
    desk.take(CallCredit(77, 5))
    desk.call(1)
    desk.take(CallCredit(1, 5))
    desk.engine.futures[0].set_result(response())
    await settle()
    assert [frame.call for frame in desk.process.frames] == [1]


# ---- the repository ----


async def test_the_repository_is_asked(desk):
    repository = desk.engine.repository

    async def change():
        pass

    repository.change = change
    desk.take(Ask(2, "load", "other", config="{}", files={"1/a": b"x"}))
    desk.take(Ask(3, "unload", "other", dependents=True))
    await settle()
    repository.change = None
    desk.take(Ask(1, "is_ready", "gone", "2"))
    await settle()
    assert repository.asked == [
        ("load", "other", "{}", {"1/a": b"x"}),
        ("unload", "other", True),
        ("is_ready", "gone", "2"),
    ]
    assert desk.process.frames == [
        CallAnswer(2, True),
        CallAnswer(3, True),
        CallAnswer(1, True, parameters={"ready": False}),
    ]
    assert desk.idle


@pytest.mark.parametrize("verb", ["is_ready", "load", "unload"])
@pytest.mark.parametrize(
    ("error", "kind"), [(InvalidRequest("load failed"), "invalid"), (ZeroDivisionError("a bug"), "internal")]
)
async def test_what_goes_wrong_there_is_told(desk, verb, error, kind):
    def fail():
        raise error

    async def fail_later():
        raise error

    desk.engine.repository.change = fail if verb == "is_ready" else fail_later
    desk.take(Ask(1, verb, "other"))
    await settle()
    (frame,) = desk.process.frames
    assert (frame.last, frame.kind) == (True, kind)
    assert str(error) in frame.message
    assert desk.idle
