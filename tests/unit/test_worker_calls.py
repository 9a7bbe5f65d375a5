"""A model's calls of other models, from the worker's side; the front process is the test."""

import contextlib
import gc
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from headrace.core.errors import InternalError, InvalidRequest, Kind, NotFound, Overloaded
from headrace.core.tensor import DATATYPE_BY_NAME, from_wire
from headrace.workers import calls as worker_calls
from headrace.workers import channel
from headrace.workers.arena import Segment
from headrace.workers.calls import CALL_WINDOW, CALL_WINDOW_BYTES, Calls, OpenCalls
from headrace.workers.channel import receive, send_blocking
from headrace.workers.conversation import Conversation, ConversationEnded
from headrace.workers.frames import (
    Ask,
    Call,
    CallAnswer,
    CallCredit,
    CallEnd,
    TensorFrame,
    decode_from_worker,
    encode,
)
from headrace_backends.base import ModelCall

WAIT_S = 60
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def leaked(before):
    """How many descriptors more than ``before`` are open that no garbage holds."""
    if open_descriptors() > before:
        gc.collect()
    return max(0, open_descriptors() - before)


class Front:
    """Both ends of a worker's socket, and what its models are given to call."""

    def __init__(self):
        self.sock, self.theirs = channel.pair()
        self.sock.settimeout(WAIT_S)
        self.open_calls = OpenCalls()
        self.conversation = Conversation(self.theirs, self._on_message)
        self.calls = Calls(self.conversation, self.open_calls, 3)

    def _on_message(self, frame, descriptors):
        self.open_calls.answer(frame, descriptors)
        return True

    def hear(self):
        """The next frame, and of a Call its inputs."""
        data, descriptors = receive(self.sock)
        frame = decode_from_worker(data)
        if not isinstance(frame, Call):
            assert not descriptors
            return frame
        inputs = {}
        segment = Segment(descriptors[0], frame.segment_bytes) if descriptors else None
        for name, tensor in frame.inputs:
            data = segment.view[tensor.offset : tensor.offset + tensor.nbytes] if segment else b""
            inputs[name] = from_wire(bytes(data), DATATYPE_BY_NAME[tensor.datatype], tensor.shape)
        for descriptor in descriptors:
            os.close(descriptor)
        return frame, inputs

    def answer(self, call, last=True, outputs=None, segment_bytes=0, **more):
        """Answer a call; outputs are bytes by name, of UINT8, in memory of at least ``segment_bytes``."""
        placed, offset = [], 0
        for name, data in (outputs or {}).items():
            placed.append((name, TensorFrame(offset, len(data), (len(data),), "UINT8"), data))
            offset += 64
        descriptors = []
        if any(data for _, _, data in placed):
            offset = max(offset, segment_bytes)
            segment, descriptor = Segment.create(offset)
            descriptors.append(descriptor)
            for _, frame, data in placed:
                segment.view[frame.offset : frame.offset + len(data)] = data
        frame = CallAnswer(call, last, tuple(one[:2] for one in placed), segment_bytes=offset, **more)
        send_blocking(self.sock, encode(frame), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def silent(self):
        """See that there is nothing more to hear."""
        self.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            receive(self.sock)
        self.sock.settimeout(WAIT_S)


@pytest.fixture
def front():
    before = open_descriptors()
    made = Front()
    with ThreadPoolExecutor(8) as pool:
        made.pool = pool
        yield made
        made.sock.close()
        with contextlib.suppress(ConversationEnded):
            made.conversation.wait_until(lambda: False)
    made.theirs.close()
    assert len(made.open_calls) == 0, "calls that nobody waits for are kept"
    made.pool = None
    assert leaked(before) == 0


def values(answer):
    return {name: array.tolist() for name, array in answer.outputs.items()}


# ---- one answer ----


def test_a_call_is_sent_with_its_inputs_and_answered_with_arrays(front):
    call = ModelCall(
        "other", {"x": X, "s": np.array([b"a", b"bcd"], object)}, "2", ("y",), "id-1", {"k": 1.5}, timeout_us=77
    )
    front.calls.on_behalf_of = 9
    calling = front.pool.submit(front.calls.infer, call)
    frame, inputs = front.hear()
    assert (frame.instance, frame.model, frame.version) == (3, "other", "2")
    assert (frame.outputs, frame.id, frame.parameters, frame.timeout_us) == (("y",), "id-1", {"k": 1.5}, 77)
    assert not frame.streams
    assert inputs["x"].tolist() == X.tolist()
    assert inputs["s"].tolist() == [b"a", b"bcd"]
    front.answer(frame.call, outputs={"y": b"\1\2", "empty": b""}, parameters={"took": 3})
    answer = calling.result(WAIT_S)
    assert values(answer) == {"y": [1, 2], "empty": []}
    assert answer.parameters == {"took": 3}
    front.silent()


@pytest.mark.parametrize("behalf", [9, 0])
def test_only_a_call_of_the_main_thread_is_known_to_be_on_behalf_of_what_that_is_at(front, behalf):
    """Another thread may be at work for any request of the model."""
    front.calls.on_behalf_of = behalf
    answers = front.calls.stream(ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    assert frame.sequence == behalf
    front.answer(frame.call)
    assert list(answers) == []
    calling = front.pool.submit(front.calls.infer, ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    assert frame.sequence == 0
    front.answer(frame.call)
    calling.result(WAIT_S)


@pytest.mark.parametrize("array", [np.zeros((0, 3), np.float32), np.zeros(0, object)])
def test_a_call_without_bytes_brings_no_memory(front, array):
    calling = front.pool.submit(front.calls.infer, ModelCall("other", {"x": array}))
    frame, inputs = front.hear()
    assert frame.segment_bytes == 0
    assert inputs["x"].shape == array.shape
    front.answer(frame.call)
    assert values(calling.result(WAIT_S)) == {}


@pytest.mark.parametrize("datatype", [np.float16, ml_dtypes.bfloat16, np.bool_, ">i4"])
def test_inputs_of_every_kind_arrive_as_they_are(front, datatype):
    given = np.array([[1, 0], [0, 1]]).astype(datatype).T
    calling = front.pool.submit(front.calls.infer, ModelCall("other", {"x": given}))
    frame, inputs = front.hear()
    assert inputs["x"].tolist() == given.tolist()
    front.answer(frame.call)
    calling.result(WAIT_S)


def test_the_answers_memory_is_the_models_own_and_stays_as_it_is(front):
    calling = front.pool.submit(front.calls.infer, ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    front.answer(frame.call, outputs={"y": b"\5"})
    array = calling.result(WAIT_S).outputs["y"]
    calling = front.pool.submit(front.calls.infer, ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    front.answer(frame.call, outputs={"y": b"\6"})
    assert calling.result(WAIT_S).outputs["y"].tolist() == [6]
    assert array.tolist() == [5]


def test_an_error_over_there_is_raised_as_what_it_is(front):
    calling = front.pool.submit(front.calls.infer, ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    front.answer(frame.call, kind=Kind.NOT_FOUND.value, message="no such model")
    with pytest.raises(NotFound, match=r"^no such model$"):
        calling.result(WAIT_S)


def test_many_calls_at_once_each_have_their_own_answer(front):
    calling = {
        number: front.pool.submit(front.calls.infer, ModelCall("other", {"x": np.array([number], np.uint8)}))
        for number in range(8)
    }
    heard = [front.hear() for _ in calling]
    for frame, inputs in reversed(heard):
        front.answer(frame.call, outputs={"y": bytes(inputs["x"].tolist())})
    assert {number: values(one.result(WAIT_S)) for number, one in calling.items()} == {n: {"y": [n]} for n in range(8)}


def test_who_waits_when_the_front_process_goes_hears_of_it(front):
    calling = [front.pool.submit(front.calls.infer, ModelCall("other", {"x": X})) for _ in range(3)]
    for _ in calling:
        front.hear()
    front.sock.close()
    for one in calling:
        assert isinstance(one.exception(WAIT_S), ConversationEnded)


BAD_CALLS = [
    (ModelCall("other", {"x": np.zeros(2, np.complex64)}), "complex64"),
    (ModelCall("other", {"x": np.array(["a", 5], object)}), "input 'x' has an element of type int, expected str or"),
    (ModelCall("other", {"x": np.array([None])}), "input 'x' has an element of type NoneType, expected str or"),
    (ModelCall("other", {"x": np.array(["\ud800"], object)}), "input 'x' .*surrogates not allowed"),
    (ModelCall("other", {"x": X}, parameters={"k": None}), "cannot be sent"),
    (ModelCall("other", {"x": X}, parameters={"k": [1]}), "cannot be sent"),
    (ModelCall("other", {"x": X}, parameters={"k": 1 << 64}), "cannot be sent"),
    (ModelCall("other", {"x": X}, parameters={"k": "\ud800"}), "cannot be sent"),
    (ModelCall("other", {"x": X}, version=2), "cannot be sent"),
    (ModelCall("other", {"x": X}, id=None), "cannot be sent"),
    (ModelCall("other", {"x": X}, outputs=(1,)), "cannot be sent"),
    (ModelCall("other", {"x": X}, timeout_us=0.5), "cannot be sent"),
    (ModelCall("other", {5: X}), "cannot be sent"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
@pytest.mark.parametrize("streams", [False, True])
def test_what_the_front_process_could_not_read_is_refused_here(front, call, message, streams):
    """Nobody would answer it, and the model would wait for ever."""
    with pytest.raises(InvalidRequest, match=f"'other'.*{message}"):
        front.calls.stream(call) if streams else front.calls.infer(call)
    front.silent()


def test_a_call_for_which_there_is_no_memory_fails_and_is_forgotten(front, monkeypatch):
    def refuse(nbytes):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Segment, "create", refuse)
    for call in (front.calls.infer, front.calls.stream):
        with pytest.raises(OSError, match="Too many open files"):
            call(ModelCall("other", {"x": X}))
    front.silent()


def test_an_answer_whose_memory_cannot_be_mapped_is_that_calls_error_and_no_other_threads(front, monkeypatch):
    first = front.pool.submit(front.calls.infer, ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    second = front.pool.submit(front.calls.infer, ModelCall("other", {"x": X}))
    other, _ = front.hear()

    def refuse(descriptor, nbytes):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(worker_calls, "Segment", refuse)
    front.answer(other.call, outputs={"y": b"\1"})
    with pytest.raises(InternalError, match="could not be received"):
        second.result(WAIT_S)
    monkeypatch.undo()
    front.answer(frame.call, outputs={"y": b"\2"})
    assert values(first.result(WAIT_S)) == {"y": [2]}


def test_an_answer_to_nobody_is_nothing(front):
    calling = front.pool.submit(front.calls.infer, ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    front.answer(frame.call + 99, outputs={"y": b"\1"})
    front.answer(frame.call, outputs={"y": b"\2"})
    assert values(calling.result(WAIT_S)) == {"y": [2]}


# ---- any number of answers ----


def test_a_streamed_call_yields_what_comes_and_ends(front):
    answers = front.calls.stream(ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    assert frame.streams
    front.answer(frame.call, last=False, outputs={"y": b"\1"})
    assert values(next(answers)) == {"y": [1]}
    front.answer(frame.call, last=False, kind=Kind.OVERLOADED.value, message="not now")
    assert isinstance(next(answers).error, Overloaded)
    front.answer(frame.call, last=False)  # a response without outputs is one all the same
    assert values(next(answers)) == {}
    front.answer(frame.call)
    assert list(answers) == []
    with pytest.raises(StopIteration):
        next(answers)
    front.silent()


@pytest.mark.parametrize("outputs", [None, {"y": b"\1"}])
def test_the_last_answer_may_have_outputs(front, outputs):
    answers = front.calls.stream(ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    front.answer(frame.call, outputs=outputs)
    assert [values(one) for one in answers] == ([{"y": [1]}] if outputs else [])
    front.silent()


def test_the_last_answer_may_be_an_error(front):
    answers = front.calls.stream(ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    front.answer(frame.call, kind=Kind.NOT_FOUND.value, message="no such model")
    (error,) = answers
    assert isinstance(error.error, NotFound)
    front.silent()


def test_room_is_given_back_for_every_half_of_the_window(front):
    answers = front.calls.stream(ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    for _ in range(2):
        for _ in range(CALL_WINDOW // 2 - 1):
            front.answer(frame.call, last=False, outputs={"y": b"\1"})
            next(answers)
        front.silent()
        front.answer(frame.call, last=False, kind="internal", message="counts too")
        next(answers)
        assert front.hear() == CallCredit(frame.call, CALL_WINDOW // 2, (CALL_WINDOW // 2 - 1) * 64)
    front.answer(frame.call)
    assert list(answers) == []


def test_and_for_every_quarter_of_the_window_in_bytes(front):
    """Counted as the memory that the answers lie in, which is what the front counts."""
    answers = front.calls.stream(ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    nearly = CALL_WINDOW_BYTES // 4 - 64
    for _ in range(2):
        front.answer(frame.call, last=False, segment_bytes=nearly, outputs={"y": b"\1"})
        next(answers)
        front.silent()
        front.answer(frame.call, last=False, outputs={"y": b"\1"})
        next(answers)
        assert front.hear() == CallCredit(frame.call, 2, CALL_WINDOW_BYTES // 4)
    front.answer(frame.call, last=False, segment_bytes=2 * CALL_WINDOW_BYTES, outputs={"y": b"\1"})
    next(answers)
    assert front.hear() == CallCredit(frame.call, 1, 2 * CALL_WINDOW_BYTES)
    front.answer(frame.call, segment_bytes=2 * CALL_WINDOW_BYTES, outputs={"y": b"\1"})
    assert len(list(answers)) == 1
    front.silent()  # the last one needs no room


@pytest.mark.parametrize("taken", [0, 1])
@pytest.mark.parametrize("how", ["close", "forget"])
def test_one_that_is_closed_or_let_go_of_takes_its_request_back_also_before_the_first_answer(front, taken, how):
    answers = front.calls.stream(ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    for _ in range(taken):
        front.answer(frame.call, last=False, outputs={"y": b"\1"})
        next(answers)
    if how == "close":
        answers.close()
        answers.close()
        assert list(answers) == []
    del answers
    gc.collect()
    assert front.hear() == CallEnd(frame.call)
    front.silent()


def test_one_that_was_read_to_its_end_is_not_taken_back(front):
    answers = front.calls.stream(ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    front.answer(frame.call)
    list(answers)
    answers.close()
    del answers
    gc.collect()
    front.silent()


def test_late_answers_to_one_that_was_taken_back_are_nothing(front):
    answers = front.calls.stream(ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    answers.close()
    assert front.hear() == CallEnd(frame.call)
    front.answer(frame.call, last=False, outputs={"y": b"\1"})
    calling = front.pool.submit(front.calls.infer, ModelCall("other", {"x": X}))
    other, _ = front.hear()
    front.answer(other.call, outputs={"y": b"\2"})
    assert values(calling.result(WAIT_S)) == {"y": [2]}


def test_an_answer_without_its_memory_takes_the_request_back(front):
    answers = front.calls.stream(ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    lost = CallAnswer(frame.call, False, (("y", TensorFrame(0, 4, (4,), "UINT8")),), segment_bytes=64)
    send_blocking(front.sock, encode(lost))
    with pytest.raises(InternalError, match="could not be received"):
        next(answers)
    assert front.hear() == CallEnd(frame.call)
    assert list(answers) == []


def test_one_that_another_thread_closes_ends_with_the_next_frame(front):
    answers = front.calls.stream(ModelCall("other", {"x": X}))
    frame, _ = front.hear()
    reading = threading.Event()
    original = front.conversation.wait_until

    def watched(happened):
        reading.set()
        original(happened)

    front.conversation.wait_until = watched
    waiting = front.pool.submit(next, answers, None)
    assert reading.wait(WAIT_S)
    answers.close()
    assert front.hear() == CallEnd(frame.call)
    front.answer(frame.call, last=False, outputs={"y": b"\1"})
    assert waiting.result(WAIT_S) is None


def test_when_the_front_process_is_gone_letting_go_is_no_error(front):
    answers = front.calls.stream(ModelCall("other", {"x": X}))
    front.hear()
    front.sock.close()
    with pytest.raises(OSError, match="Broken pipe"):
        next(answers)
    another = None
    with contextlib.suppress(OSError):
        another = front.calls.stream(ModelCall("other", {"x": X}))
    assert another is None
    del answers
    gc.collect()


# ---- the repository ----


def test_the_repository_is_asked(front):
    asking = front.pool.submit(front.calls.is_ready, "other", "2")
    ask = front.hear()
    assert ask == Ask(ask.call, "is_ready", "other", "2")
    front.answer(ask.call, parameters={"ready": True})
    assert asking.result(WAIT_S) is True
    asking = front.pool.submit(front.calls.load, "other", json.dumps({"a": 1}), {"1/model.py": b"x"})
    ask = front.hear()
    assert ask == Ask(ask.call, "load", "other", "", '{"a": 1}', {"1/model.py": b"x"})
    front.answer(ask.call)
    assert asking.result(WAIT_S) is None
    asking = front.pool.submit(front.calls.unload, "other", dependents=True)
    ask = front.hear()
    assert ask == Ask(ask.call, "unload", "other", dependents=True)
    front.answer(ask.call, kind=Kind.FORBIDDEN.value, message="not under these settings")
    assert "not under these settings" in str(asking.exception(WAIT_S))


@pytest.mark.parametrize(
    ("name", "config", "files"), [("other", "{", {}), ("other", "", {"f": "text"}), ("other", "", {1: b""})]
)
def test_what_the_repository_could_not_be_asked_is_refused(front, name, config, files):
    with pytest.raises(InvalidRequest, match="'other'"):
        front.calls.load(name, config, files)
    front.silent()
