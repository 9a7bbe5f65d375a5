"""Decoupled requests in the worker: a worker in a thread, and the front process's end of its socket in the test."""

import contextlib
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from headrace.core.errors import InvalidRequest, Kind, Overloaded
from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace.workers import channel, device_loss, streams, worker
from headrace.workers.arena import HEADER_BYTES, SMALLEST_BYTES, Segment
from headrace.workers.channel import receive, send_blocking
from headrace.workers.conversation import Conversation, ConversationEnded
from headrace.workers.frames import (
    Begun,
    Cancel,
    Credit,
    CustomMetrics,
    Done,
    Ended,
    Failed,
    Load,
    Loaded,
    LoadFailed,
    NamedTensor,
    Part,
    RequestFrame,
    Run,
    Stop,
    TensorFrame,
    decode_from_worker,
    encode,
)
from headrace.workers.main import build
from headrace.workers.streams import AHEAD, WINDOW, WINDOW_BYTES, Stream, Streams
from headrace_backends.base import Answer, Backend, CustomMetric, DeviceLost, LoadError, RequestInfo
from headrace_backends.failures import device_lost

WAIT_S = 60
X, Y = TensorSpec("x", DataType.UINT8, (-1,)), TensorSpec("y", DataType.UINT8, None)
STREAMING = Signature((X,), (Y,), decoupled=True)
PLAIN = Signature((X,), (Y,))
LOAD = Load(0, "made up", "m", "1", "/m", "cpu", 1, Signature((), ()), None, {}, False)


class Model(Backend):
    """Answers as the test says."""

    wants_requests = True

    def __init__(self, begin=None, execute=None, signature=None):
        self._begin = begin
        self._execute = execute
        self._signature = signature or (STREAMING if begin else PLAIN)
        self.told = ()

    @classmethod
    def load(cls, source):
        raise NotImplementedError

    @property
    def signature(self):
        return self._signature

    def execute(self, inputs, requests):
        return self._execute(inputs)

    def begin(self, inputs, stream):
        return self._begin(inputs, stream)

    def metrics(self):
        return self.told() if callable(self.told) else self.told


def answer(*values, **parameters):
    return Answer({"y": np.array(values, np.uint8)}, parameters)


def nothing():
    """What is done at some moment, where that is of no interest."""


def values(part):
    """What a response of one output holds."""
    (tensor,) = part.outputs
    assert tensor == NamedTensor("y", "UINT8", (len(tensor.data),), tensor.data)
    return list(tensor.data)


class Front:
    """What tells the worker and hears it."""

    def __init__(self, monkeypatch):
        self._sock, self._theirs = channel.pair()
        self._sock.settimeout(WAIT_S)
        self._models = {}
        self._segments = {}
        self._outputs = {}
        monkeypatch.setattr(worker, "resolve", lambda _: self)
        self.worker = build(self._theirs)
        self._thread = threading.Thread(target=self._serve)
        self.error = None

    def _serve(self):
        try:
            self.worker.serve()
        except BaseException as error:  # noqa: BLE001 - a test tells what it expects
            self.error = error
        finally:
            self._theirs.close()

    def load(self, source):
        """What the worker takes for a backend's class."""
        model = self._models[source.name]
        if isinstance(model, BaseException):
            raise model
        return model

    def serve(self, *models):
        """Load the models, as instances from 0 on, and work."""
        for instance, model in enumerate(models):
            self._models[str(instance)] = model
            self.tell(msgspec.structs.replace(LOAD, instance=instance, name=str(instance)))
        self._thread.start()
        return [self.hear() for _ in models]

    def tell(self, frame, descriptors=()):
        send_blocking(self._sock, encode(frame), descriptors)

    def ask(self, sequence, *numbers, instance=0, slot=0):
        """A request, whose input is these numbers."""
        segment_bytes, descriptors = 0, []
        key = instance, slot
        if key not in self._segments:
            segment_bytes = SMALLEST_BYTES
            self._segments[key], descriptor = Segment.create(segment_bytes)
            descriptors.append(descriptor)
        view = self._segments[key].view
        view[HEADER_BYTES : HEADER_BYTES + len(numbers)] = bytes(numbers)
        tensor = TensorFrame(HEADER_BYTES, len(numbers), (len(numbers),))
        self.tell(
            Run(instance, sequence, slot, segment_bytes, (tensor,), (RequestFrame(1, f"r-{sequence}", {"k": 1}),)),
            descriptors,
        )
        for descriptor in descriptors:
            os.close(descriptor)

    def hear(self):
        data, descriptors = receive(self._sock)
        frame = decode_from_worker(data)
        if isinstance(frame, Done) and frame.segment_bytes:
            self._outputs[0] = Segment(descriptors[0], frame.segment_bytes)
        for descriptor in descriptors:
            os.close(descriptor)
        return frame

    def output(self, done):
        """What the output segment holds for a batch."""
        frame = done.outputs[0] if done.outputs else done.answers[0].outputs[0]
        return list(self._outputs[0].view[frame.offset : frame.offset + frame.nbytes])

    def hear_all(self, sequence):
        """Every response to a request, and the end."""
        heard = []
        while True:
            frame = self.hear()
            if isinstance(frame, Begun):
                continue
            assert frame.sequence == sequence
            heard.append(frame)
            if isinstance(frame, Ended):
                return heard

    def nothing_more(self):
        """See that the worker has nothing left to say, and have it stop."""
        self.tell(Stop())
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        assert self.error is None, self.error
        data, _ = receive(self._sock)
        assert data == b"", decode_from_worker(data)

    def close(self):
        self._sock.close()
        if self._thread.ident is not None:
            self._thread.join(WAIT_S)
            assert not self._thread.is_alive(), "the worker hangs"
        self._theirs.close()
        self.worker.close()


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def leaked(before):
    """How many descriptors more than ``before`` are open that no garbage holds."""
    if open_descriptors() > before:
        gc.collect()
    return max(0, open_descriptors() - before)


@pytest.fixture
def front(monkeypatch, caplog):
    before = open_descriptors()
    made = Front(monkeypatch)
    yield made
    made.close()
    made._models.clear()  # which may hold on to their streams, and so to the worker
    made._segments.clear()
    made._outputs.clear()
    made.worker = made.error = None
    caplog.get_records("call").clear()  # tracebacks, which hold on to memory
    assert leaked(before) == 0


# ---- one request ----


def test_a_request_is_begun_then_answered_part_by_part_then_ended(front):
    def begin(inputs, stream):
        assert stream.request == RequestInfo(1, "r-7", {"k": 1})
        return (answer(number, at=index) for index, number in enumerate(inputs["x"]))

    front.serve(Model(begin))
    front.ask(7, 5, 6)
    begun, first, second, last = [front.hear() for _ in range(4)]
    assert isinstance(begun, Begun)
    assert [values(first), values(second)] == [[5], [6]]
    assert [first.parameters, second.parameters] == [{"at": 0}, {"at": 1}]
    assert (begun.sequence, first.sequence, last) == (7, 7, Ended(7))
    front.nothing_more()


def test_the_slot_may_be_used_again_as_soon_as_the_request_is_begun(front):
    waits = threading.Event()

    def begin(inputs, stream):
        def give():
            waits.wait(WAIT_S)
            yield answer(*inputs["x"])

        return give()

    front.serve(Model(begin))
    front.ask(1, 5)
    assert front.hear().sequence == 1
    front._segments[0, 0].view[HEADER_BYTES] = 99
    waits.set()
    assert values(front.hear()) == [5]
    assert front.hear() == Ended(1)


def test_a_model_may_give_nothing_or_errors_between_its_responses(front):
    def begin(inputs, stream):
        if inputs["x"][0] == 0:
            return iter(())
        return iter((answer(1), Answer(error=Overloaded("not now"), parameters={"k": 2}), answer(2)))

    front.serve(Model(begin))
    front.ask(1, 0)
    assert front.hear_all(1) == [Ended(1)]
    front.ask(2, 1)
    first, error, second, last = front.hear_all(2)
    assert (values(first), values(second), last) == ([1], [2], Ended(2))
    assert (error.kind, error.message, error.parameters) == (Kind.OVERLOADED.value, "not now", {"k": 2})


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (lambda: InvalidRequest("x is odd"), "invalid", "x is odd"),
        (lambda: KeyError("k"), "internal", "KeyError: 'k'"),
        (lambda: OSError("file \udcff"), "internal", "OSError: file ?"),
        (Unprintable, "internal", "Unprintable: (without a text)"),
    ],
)
@pytest.mark.parametrize("where", ["begin", "first", "later", "close"])
def test_whatever_a_model_raises_ends_its_request_and_no_other(front, error, kind, message, where):
    def begin(inputs, stream):
        if inputs["x"][0] == 0:
            return iter((answer(0),))
        if where == "begin":
            raise error()

        def give():
            if where == "first":
                raise error()
            try:
                while True:
                    yield answer(1)
                    if where == "later":
                        raise error()
            finally:
                if where == "close":
                    raise error()

        return give()

    front.serve(Model(begin))
    front.ask(1, 1)
    if where == "close":
        assert isinstance(front.hear(), Begun)
        front.tell(Cancel(1))
    heard = front.hear_all(1)
    assert heard[-1] == Ended(1, kind, message)
    front.ask(2, 0)
    assert [values(one) for one in front.hear_all(2)[:-1]] == [[0]]
    front.nothing_more()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Answer({"z": np.zeros(1, np.uint8)}), "'z'"),
        (Answer({"y": np.zeros(1, np.float32)}), "FP32"),
        (Answer({"y": np.zeros(1, np.complex64)}), "complex64"),
        (Answer({"y": np.zeros(1, np.uint8)}, {"k": None}), "'k' is None"),
        (Answer({"y": np.zeros(1, np.uint8)}, {"k": [1]}), "'k'"),
        (Answer({"y": np.zeros(1, np.uint8)}, {"k": 1 << 64}), "64 bits"),
        (Answer({"y": np.zeros(1, np.uint8)}, {"k": "\ud800"}), "surrogate"),
        (Answer({"y": np.zeros(1, np.uint8)}, {5: 1}), "5"),
        ("no answer", "AttributeError"),
    ],
)
def test_a_response_that_cannot_be_sent_ends_the_request_with_an_error(front, given, said):
    front.serve(Model(lambda inputs, stream: iter((answer(1), given, answer(2)))))
    front.ask(1, 0)
    first, last = front.hear_all(1)
    assert values(first) == [1]
    assert last.kind == "internal"
    assert said in last.message
    front.nothing_more()


def test_numpys_numbers_may_be_parameters(front):
    front.serve(Model(lambda inputs, stream: iter((answer(1, a=np.float64(0.5), b=np.int64(3), c=np.bool_(True)),))))
    front.ask(1, 0)
    part, _ = front.hear_all(1)
    assert part.parameters == {"a": 0.5, "b": 3, "c": True}


# ---- a slow client ----


def test_a_client_that_does_not_read_is_given_a_window_and_then_what_it_has_read(front):
    made = []

    def begin(inputs, stream):
        for number in range(3 * WINDOW):
            made.append(number)
            yield answer(number)

    front.serve(Model(begin))
    front.ask(1, 0)
    assert isinstance(front.hear(), Begun)
    assert [values(front.hear()) for _ in range(WINDOW)] == [[number] for number in range(WINDOW)]
    front.ask(2, 0)  # the worker is not stuck in the first one
    heard = [front.hear() for _ in range(WINDOW + 1)]
    assert {one.sequence for one in heard} == {2}
    assert len(made) == 2 * WINDOW, "nothing is made ahead of the window"
    front.tell(Credit(1, 2))
    assert [values(front.hear()) for _ in range(2)] == [[WINDOW], [WINDOW + 1]]
    front.tell(Credit(1, 3 * WINDOW))
    assert len(front.hear_all(1)) == 2 * WINDOW - 2 + 1
    front.tell(Cancel(2))
    assert front.hear() == Ended(2)
    front.nothing_more()


def test_a_model_that_sends_by_itself_waits_for_its_client(front):
    def begin(inputs, stream):
        def give():
            for number in range(WINDOW + 20):
                stream.send(answer(number))
            stream.end()

        thread = threading.Thread(target=give)
        threads.append(thread)
        thread.start()

    threads = []
    front.serve(Model(begin))
    front.ask(1, 0)
    assert isinstance(front.hear(), Begun)
    assert [values(front.hear()) for _ in range(WINDOW)] == [[number] for number in range(WINDOW)]
    front.tell(Credit(1, 10))
    assert [values(front.hear()) for _ in range(10)] == [[WINDOW + number] for number in range(10)]
    front.tell(Credit(1, 10))
    assert len(front.hear_all(1)) == 11
    threads[0].join(WAIT_S)
    front.nothing_more()


HALF = bytes(WINDOW_BYTES // 2)


@pytest.mark.parametrize("by_itself", [False, True])
def test_the_window_is_one_of_bytes_as_well(front, by_itself):
    sizes = [len(HALF) - 1, 1, len(HALF), 3 * WINDOW_BYTES, 1, 1]  # one of them larger than the window
    threads = []

    def begin(inputs, stream):
        answers = (Answer({"y": np.zeros(size, np.uint8)}) for size in sizes)
        if not by_itself:
            return answers

        def give():
            for one in answers:
                stream.send(one)
            stream.end()

        threads.append(threading.Thread(target=give))
        threads[0].start()
        return None

    def size():
        (tensor,) = front.hear().outputs
        return len(tensor.data)

    def nothing_comes():
        """Whatever the worker is asked next is what is heard next."""
        front.ask(99, 0, instance=1)
        assert isinstance(front.hear(), Done)

    front.serve(Model(begin), Model(None, lambda inputs: {"y": inputs["x"]}))
    front.ask(1, 0)
    assert isinstance(front.hear(), Begun)
    assert [size() for _ in range(3)] == sizes[:3]
    nothing_comes()
    front.tell(Credit(1, 1, len(HALF) - 1))
    assert size() == sizes[3], "there is room for something"
    front.tell(Credit(1, 2, len(HALF) + 1))
    nothing_comes()
    front.tell(Credit(1, 1, 3 * WINDOW_BYTES))
    assert len(front.hear_all(1)) == 3
    for thread in threads:
        thread.join(WAIT_S)
    front.nothing_more()


def test_an_answer_that_cannot_be_sent_takes_no_room(front):
    def begin(inputs, stream):
        def give():
            for _ in range(2 * WINDOW):
                with contextlib.suppress(TypeError):
                    stream.send(answer(1, k=[1]))
            for number in range(WINDOW):
                stream.send(answer(number))
            stream.end()

        threads.append(threading.Thread(target=give))
        threads[0].start()

    threads = []
    front.serve(Model(begin))
    front.ask(1, 0)
    assert len(front.hear_all(1)) == WINDOW + 1
    threads[0].join(WAIT_S)


@pytest.mark.parametrize("most_bytes", [WINDOW_BYTES, WINDOW // 2])
def test_room_is_counted_exactly_when_many_threads_send(front, monkeypatch, most_bytes):
    """Credit comes in one thread and is used up in others: an update that is lost stops the stream for ever."""
    each, threads = 400, 4
    monkeypatch.setattr(streams, "WINDOW_BYTES", most_bytes)
    most = min(WINDOW, most_bytes)  # of one byte each

    def begin(inputs, stream):
        def give():
            for _ in range(each):
                stream.send(answer(1))

        def run():
            with ThreadPoolExecutor(threads) as pool:
                for done in [pool.submit(give) for _ in range(threads)]:
                    done.result()
            stream.end()

        working.append(threading.Thread(target=run))
        working[0].start()

    working = []
    front.serve(Model(begin))
    front.ask(1, 0)
    assert isinstance(front.hear(), Begun)
    under_way = 0
    for _ in range(each * threads):
        assert isinstance(front.hear(), Part)
        under_way += 1
        assert under_way <= most
        if under_way >= most // 2:
            front.tell(Credit(1, under_way, under_way))
            under_way = 0
    assert front.hear() == Ended(1)
    working[0].join(WAIT_S)
    front.nothing_more()


# ---- a model that sends from within begin, which others wait for ----


def sending(count, size=1, then=nothing):
    """A model of which each request is answered so, and another one that answers batches."""

    def begin(inputs, stream):
        for _ in range(count):
            stream.send(answer(*bytes(size)))
        then()
        stream.end()

    return Model(begin), Model(None, lambda inputs: {"y": inputs["x"]})


def test_a_client_that_reads_is_given_all_however_much_it_is(front):
    front.serve(*sending(3 * AHEAD))
    front.ask(1, 0)
    assert isinstance(front.hear(), Begun)
    heard = 0
    while isinstance(frame := front.hear(), Part):
        heard += 1
        if heard % (WINDOW // 2) == 0:
            front.tell(Credit(1, WINDOW // 2, WINDOW // 2))
    assert (heard, frame) == (3 * AHEAD, Ended(1))
    front.nothing_more()


def test_a_client_that_does_not_read_is_given_so_much_and_does_not_hold_up_others_for_long(front, monkeypatch):
    monkeypatch.setattr(streams, "PATIENCE_S", 0.0)
    went_on = threading.Event()
    front.serve(*sending(3 * AHEAD, then=went_on.set))
    front.ask(1, 0)
    *parts, last = front.hear_all(1)
    assert len(parts) == AHEAD
    assert (last.sequence, last.kind) == (1, "overloaded")
    assert f"the client has not read {AHEAD} responses of {AHEAD} bytes" in last.message
    front.ask(2, 5, instance=1)
    assert front.output(front.hear()) == [5]
    assert went_on.is_set(), "what it sends afterwards goes nowhere"
    front.nothing_more()


def test_nor_is_it_given_more_bytes_than_that(front, monkeypatch):
    monkeypatch.setattr(streams, "PATIENCE_S", 0.0)
    monkeypatch.setattr(streams, "WINDOW_BYTES", 100)
    monkeypatch.setattr(streams, "AHEAD_BYTES", 1000)
    front.serve(*sending(30, 400))
    front.ask(1, 0)
    *parts, last = front.hear_all(1)
    assert len(parts) == 3
    assert "has not read 3 responses of 1200 bytes" in last.message
    front.nothing_more()


@pytest.mark.parametrize("unit", ["responses", "bytes"])
def test_a_client_that_falls_behind_is_waited_for_until_it_has_read_half(front, monkeypatch, unit):
    """As long as that takes it no longer than the moment that there is."""
    monkeypatch.setattr(streams, "PATIENCE_S", float(WAIT_S))
    most = AHEAD
    if unit == "bytes":
        most = 64
        monkeypatch.setattr(streams, "WINDOW_BYTES", 8)
        monkeypatch.setattr(streams, "AHEAD_BYTES", most)
    looked = threading.Semaphore(0)
    monkeypatch.setattr(streams, "sleep", lambda _: looked.release())
    front.serve(*sending(most + 9))
    front.ask(1, 0)
    assert isinstance(front.hear(), Begun)
    for _ in range(most):
        assert isinstance(front.hear(), Part)
    assert looked.acquire(timeout=WAIT_S)
    front.tell(Credit(1, most // 2, most // 2))
    while looked.acquire(blocking=False):
        pass
    for _ in range(3):
        assert looked.acquire(timeout=WAIT_S), "it does not wait"
    front._sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        front.hear()
    front._sock.settimeout(WAIT_S)
    front.tell(Credit(1, 1, 1))
    assert len(front.hear_all(1)) == 9 + 1
    front.nothing_more()


def test_a_client_that_leaves_meanwhile_is_noticed_once_it_is_behind(front):
    left, noticed = threading.Event(), []

    def begin(inputs, stream):
        for _ in range(WINDOW):
            stream.send(answer(1))
        left.wait(WAIT_S)
        stream.send(answer(2))  # nobody hears it
        noticed.append(stream.cancelled)
        stream.end()

    front.serve(Model(begin))
    front.ask(1, 0)
    for _ in range(WINDOW + 1):
        front.hear()
    front.tell(Cancel(1))
    left.set()
    assert front.hear() == Ended(1)
    assert noticed == [True]
    front.nothing_more()


def test_an_iterator_whose_room_a_thread_has_taken_meanwhile_does_not_hold_up_the_worker(front):
    def begin(inputs, stream):
        def give():
            for _ in range(WINDOW - 1):
                yield answer(1)
            thread = threading.Thread(target=stream.send, args=(answer(2),))
            thread.start()
            thread.join(WAIT_S)
            yield answer(3)
            yield answer(4)

        return give()

    front.serve(Model(begin), Model(None, lambda inputs: {"y": inputs["x"]}))
    front.ask(1, 0)
    heard = [front.hear() for _ in range(WINDOW + 2)]
    assert [values(one) for one in heard[-2:]] == [[2], [3]]
    front.ask(2, 5, instance=1)
    assert isinstance(front.hear(), Done), "the fourth waits, and nobody else does"
    front.tell(Credit(1, 3, 3))
    assert [values(one) for one in front.hear_all(1)[:-1]] == [[4]]
    front.nothing_more()


def test_once_begin_has_returned_what_was_sent_within_counts(front):
    """Its iterator has the same window, and its other threads wait as any."""
    sent = threading.Event()
    threads = []

    def begin(inputs, stream):
        for _ in range(WINDOW + 3):
            stream.send(answer(1))

        def give():
            with contextlib.suppress(RuntimeError):  # it may come after the end
                stream.send(answer(3))
            sent.set()

        threads.append(threading.Thread(target=give))
        threads[0].start()
        return iter((answer(2),) * 2)

    front.serve(Model(begin), Model(None, lambda inputs: {"y": inputs["x"]}))
    front.ask(1, 0)
    assert [type(front.hear()) for _ in range(WINDOW + 4)] == [Begun, *[Part] * (WINDOW + 3)]
    front.ask(2, 5, instance=1)
    assert isinstance(front.hear(), Done), "nothing comes in between"
    front.tell(Credit(1, 3, 3))
    front.ask(3, 5, instance=1)
    assert isinstance(front.hear(), Done)
    assert not sent.is_set()
    front.tell(Credit(1, 1, 1))
    assert values(front.hear()) in ([2], [3])
    front.tell(Credit(1, WINDOW, WINDOW))
    assert len(front.hear_all(1)) in (2, 3)
    threads[0].join(WAIT_S)


# ---- a client that has left ----


def test_a_cancelled_request_is_closed_and_ended(front):
    closed = threading.Event()

    def begin(inputs, stream):
        try:
            while True:
                yield answer(1)
        finally:
            closed.set()

    front.serve(Model(begin))
    front.ask(1, 0)
    assert len([front.hear() for _ in range(WINDOW + 1)]) == WINDOW + 1  # it is far behind
    front.tell(Cancel(1))
    assert front.hear() == Ended(1)
    assert closed.wait(WAIT_S)
    front.nothing_more()


def test_cancelling_wakes_a_model_that_waits_for_room(front):
    def begin(inputs, stream):
        def give():
            while not stream.cancelled:
                stream.send(answer(1))
            stream.send(answer(2))  # nobody hears it
            stream.end()

        threads.append(threading.Thread(target=give))
        threads[0].start()

    threads = []
    front.serve(Model(begin))
    front.ask(1, 0)
    assert isinstance(front.hear(), Begun)
    for _ in range(WINDOW):
        assert values(front.hear()) == [1]
    front.tell(Cancel(1))
    assert front.hear() == Ended(1)
    threads[0].join(WAIT_S)
    front.nothing_more()


@pytest.mark.parametrize("number", [1, 77])
def test_word_about_a_request_that_is_over_or_unknown_is_nothing(front, number):
    front.serve(Model(lambda inputs, stream: iter((answer(1),))))
    front.ask(1, 0)
    front.hear_all(1)
    for frame in (Credit(number, 5), Cancel(number), Cancel(number)):
        front.tell(frame)
    front.ask(2, 0)
    assert [values(one) for one in front.hear_all(2)[:-1]] == [[1]]
    front.nothing_more()


# ---- a model that does as it likes ----


def test_nothing_is_sent_after_the_end(front):
    errors = []

    def begin(inputs, stream):
        stream.send(answer(1))
        stream.end()
        stream.end(RuntimeError("too late"))
        try:
            stream.send(answer(2))
        except RuntimeError as error:
            errors.append(str(error))

    front.serve(Model(begin))
    front.ask(1, 0)
    assert [type(one) for one in front.hear_all(1)] == [Part, Ended]
    front.nothing_more()
    assert errors == ["a response was sent after the last one"]


@pytest.mark.parametrize("raises", [False, True])
def test_a_model_that_ends_by_itself_and_then_goes_on_or_fails_has_ended_once(front, raises):
    def begin(inputs, stream):
        stream.send(answer(1))
        stream.end()
        if raises:
            raise ValueError("after the end")
        return iter((answer(2), answer(3)))

    front.serve(Model(begin))
    front.ask(1, 0)
    first, last = front.hear_all(1)
    assert (values(first), last) == ([1], Ended(1))
    front.nothing_more()


def test_a_model_that_ends_while_its_iterator_waits_for_room_is_forgotten(front):
    streams, closed = [], threading.Event()

    def begin(inputs, stream):
        streams.append(stream)

        def give():
            try:
                while True:
                    yield answer(1)
            finally:
                closed.set()

        return give()

    front.serve(Model(begin))
    front.ask(1, 0)
    for _ in range(WINDOW + 1):
        front.hear()
    streams[0].end()
    assert front.hear() == Ended(1)
    front.ask(2, 0)  # whatever wakes the worker
    assert isinstance(front.hear(), Begun)
    assert closed.wait(WAIT_S)


def test_the_end_is_the_last_that_is_said_whichever_threads_send_and_end(front):
    rounds = 60

    def begin(inputs, stream):
        meet = threading.Barrier(3)

        def give():
            meet.wait(WAIT_S)
            with contextlib.suppress(RuntimeError):
                for _ in range(8):
                    stream.send(answer(1))

        def end():
            meet.wait(WAIT_S)
            stream.end()

        threads = [threading.Thread(target=one) for one in (give, end, end)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(WAIT_S)

    front.serve(Model(begin))
    for sequence in range(1, rounds + 1):
        front.ask(sequence, 0)
        front.hear_all(sequence)  # the next thing heard is about the next request
    front.nothing_more()


# ---- many at once ----


def test_requests_take_turns(front):
    def begin(inputs, stream):
        return (answer(number) for number in range(4))

    waits = threading.Event()

    def slow_begin(inputs, stream):
        waits.wait(WAIT_S)
        return begin(inputs, stream)

    front.serve(Model(slow_begin))
    for sequence in (1, 2, 3):
        front.ask(sequence, 0, slot=sequence)
    waits.set()
    order = [frame.sequence for frame in (front.hear() for _ in range(3 * 6)) if isinstance(frame, Part)]
    for sequence in (1, 2, 3):
        places = [place for place, one in enumerate(order) if one == sequence]
        assert len(places) == 4
        assert places[-1] - places[0] >= 5, f"one after the other: {order}"


def test_streams_go_on_while_batches_never_stop_coming(front):
    """Somebody else's model in the same worker has always another batch there when one is done."""
    asked = 0

    def execute(inputs):
        nonlocal asked
        asked += 1
        front.ask(1000 + asked, 0, instance=1)  # before this one is done, so that the worker never finds nothing
        return {"y": inputs["x"]}

    front.serve(Model(lambda inputs, stream: (answer(number) for number in range(5))), Model(None, execute))
    front.ask(999, 0, instance=1)
    front.ask(1, 0)
    heard = []
    for _ in range(100_000):  # how many batches go by meanwhile is the scheduler's to say
        frame = front.hear()
        if isinstance(frame, Part):
            heard.append(values(frame))
        if isinstance(frame, Ended):
            break
    assert heard == [[0], [1], [2], [3], [4]]


class Silent:
    """A conversation that nobody listens to."""

    def __init__(self):
        self.sent = 0

    def send(self, frame, descriptors=()):
        self.sent += 1

    def send_encoded(self, frame, descriptors=()):
        self.sent += 1

    def wait_until(self, happened):
        assert happened(), "it would wait"

    def poll(self):
        raise AssertionError("nobody sends from within begin")


class Calls:
    on_behalf_of = 0


def test_a_thousand_slow_clients_do_not_make_a_response_dearer(monkeypatch):
    asked = 0
    original = Stream.waits.fget

    def counted(self):
        nonlocal asked
        asked += 1
        return original(self)

    streams = Streams(Silent())

    def begin(inputs, stream):
        return (answer(1) for _ in range(10_000))

    for sequence in range(1000):
        streams.begin("m", Model(begin), Calls(), sequence, RequestInfo(1, "", {}), {}, nothing)
    while streams.runnable:
        streams.step()
    streams.credit(7, 100, 100)
    monkeypatch.setattr(Stream, "waits", property(counted))
    steps = 0
    while streams.runnable:
        streams.step()
        steps += 1
    assert steps == 100
    assert asked <= 4 * steps
    for sequence in range(1000):
        streams.cancel(sequence)
    while streams.runnable:
        streams.step()
    assert not streams._open
    assert not streams._aside


def test_credit_that_comes_while_a_request_is_put_aside_is_not_lost(monkeypatch):
    """Another thread may read of it between the moment that there is no room and the putting aside."""
    streams = Streams(Silent())
    streams.begin("m", Model(lambda inputs, stream: (answer(1) for _ in range(99))), Calls(), 1, None, {}, nothing)
    for _ in range(WINDOW - 1):
        streams.step()
    original = streams._put_aside

    def put_aside(turn):
        assert turn.stream.waits
        streams.credit(1, 5, 5)
        original(turn)

    monkeypatch.setattr(streams, "_put_aside", put_aside)
    streams.step()
    assert streams.runnable


def test_a_stream_knows_on_whose_behalf_its_model_calls(front):
    seen = []

    class Watching(Model):
        def begin(self, inputs, stream):
            calls = front.worker._models[0].calls
            seen.append(calls.on_behalf_of)

            def give():
                for _ in range(2):
                    seen.append(calls.on_behalf_of)
                    yield answer(1)

            return give()

    front.serve(Watching(signature=STREAMING))
    front.ask(7, 0)
    front.hear_all(7)
    front.nothing_more()
    assert seen == [7, 7, 7]
    assert front.worker._models[0].calls.on_behalf_of == 0


# ---- batches ----


def test_a_batch_is_answered_out_of_its_slots_memory(front):
    (loaded,) = front.serve(Model(None, lambda inputs: {"y": inputs["x"] + 1}))
    assert isinstance(loaded, Loaded)
    made = []
    for number in range(3):
        front.ask(number + 1, number)
        done = front.hear()
        made.append(done.segment_bytes)
        assert front.output(done) == [number + 1]
    assert made == [SMALLEST_BYTES, 0, 0]


def test_an_answer_that_cannot_be_told_does_not_leave_the_front_with_the_memory_of_another(front):
    """The worker made new memory for the answer, and the front did not hear of it."""

    def execute(inputs):
        if len(inputs["x"]) > 1:
            return [Answer({"y": np.full(2 * SMALLEST_BYTES, 7, np.uint8)}, {"k": 1})]
        return [Answer({"y": inputs["x"]})]

    model = Model(None, execute)
    front.serve(model)
    front.ask(1, 5)
    assert front.output(front.hear()) == [5]
    original = worker.frames.Done
    refusing = True

    def done(*arguments):
        if refusing:
            raise OverflowError("it cannot be written")
        return original(*arguments)

    worker.frames.Done = done
    try:
        front.ask(2, 5, 5)
        assert isinstance(front.hear(), Failed)
        refusing = False
        front.ask(3, 6)
        frame = front.hear()
    finally:
        worker.frames.Done = original
    assert frame.segment_bytes, "it is told of the new memory"
    assert front.output(frame) == [6]


def test_memory_that_cannot_be_had_fails_the_batch_and_not_the_next(front, monkeypatch):
    front.serve(Model(None, lambda inputs: {"y": np.repeat(inputs["x"], 2 * SMALLEST_BYTES // len(inputs["x"]))}))
    original = Segment.create

    def refuse(nbytes):
        raise OSError(12, "Cannot allocate memory")

    segment, descriptor = original(SMALLEST_BYTES)  # the front's own
    front._segments[0, 0] = segment
    view = segment.view
    view[HEADER_BYTES] = 5
    run = Run(0, 1, 0, SMALLEST_BYTES, (TensorFrame(HEADER_BYTES, 1, (1,)),), (RequestFrame(1, "", {}),))
    monkeypatch.setattr(Segment, "create", refuse)
    front.tell(run, [descriptor])
    os.close(descriptor)
    failed = front.hear()
    assert isinstance(failed, Failed)
    assert "Cannot allocate memory" in failed.message
    monkeypatch.undo()
    front.ask(2, 5)
    done = front.hear()
    assert done.segment_bytes >= 2 * SMALLEST_BYTES
    assert front.output(done) == [5] * (2 * SMALLEST_BYTES)


@pytest.mark.parametrize("parameters", [{"k": None}, {"k": b"x"}, {"k": 1 << 64}, {"k": "\ud800"}, {1: 2}])
def test_an_answer_with_parameters_that_nobody_could_read_is_that_requests_error(front, parameters):
    def execute(inputs):
        return [Answer({"y": inputs["x"]}, parameters)]

    front.serve(Model(None, execute))
    front.ask(1, 5)
    (got,) = front.hear().answers
    assert got.kind == "internal"
    assert "parameter" in got.message
    front.nothing_more()


@pytest.mark.parametrize("error", [lambda: OSError("\udcff"), Unprintable])
def test_an_error_without_a_proper_text_fails_the_batch_and_not_the_worker(front, error):
    def execute(inputs):
        raise error()

    front.serve(Model(None, execute))
    front.ask(1, 5)
    failed = front.hear()
    assert (failed.sequence, failed.kind) == (1, "internal")
    assert failed.message in {"OSError: ?", "Unprintable: (without a text)"}
    front.nothing_more()


@pytest.mark.parametrize("error", [OSError("\udcff"), Unprintable(), InvalidRequest("\udcff")])
def test_nor_does_one_at_loading(front, error):
    (failed,) = front.serve(error)
    assert isinstance(failed, LoadFailed)
    front.nothing_more()


class Panic(BaseException):
    """As of libraries that are written in Rust."""


@pytest.mark.parametrize("kind", [Panic, SystemExit])
@pytest.mark.parametrize("where", ["load", "execute", "begin", "iterator"])
def test_what_is_no_exception_fails_what_raised_it_and_not_the_worker(front, where, kind):
    def fail(*_):
        raise kind("at the bottom")

    def broken(inputs, stream):
        yield answer(1)
        fail()

    models = {
        "load": kind("at the bottom"),
        "execute": Model(None, fail),
        "begin": Model(fail),
        "iterator": Model(broken),
    }
    told = front.serve(models[where], Model(None, lambda inputs: {"y": inputs["x"]}))
    if where == "load":
        assert isinstance(told[0], LoadFailed)
        assert told[0].reason == f"{kind.__name__}: at the bottom"
    else:
        front.ask(1, 5)
        failed = front.hear() if where == "execute" else front.hear_all(1)[-1]
        assert (failed.kind, failed.message) == ("internal", f"{kind.__name__}: at the bottom")
    front.ask(2, 6, instance=1)
    assert front.output(front.hear()) == [6]
    front.nothing_more()


def metric(value, labels=()):
    return CustomMetric("c", "help", "counter", labels, value)


def test_metrics_are_told_when_they_have_changed(front):
    def execute(inputs):
        model.told = (metric(np.float64(inputs["x"][0])),)
        return {"y": inputs["x"]}

    model = Model(None, execute)
    model.told = (metric(0.0),)
    assert isinstance(front.serve(model)[0], Loaded)
    told = front.hear()
    assert isinstance(told, CustomMetrics)
    assert [one.value for one in told.samples] == [0.0]
    front.ask(1, 0)
    assert isinstance(front.hear(), Done)
    front.ask(2, 2)
    assert isinstance(front.hear(), Done), "nothing has changed by the first"
    (sample,) = front.hear().samples
    assert (sample.name, sample.value, type(sample.value)) == ("c", 2.0, float)
    front.nothing_more()


def test_metrics_of_what_a_thread_has_done_are_told_before_the_end(front):
    """Its request began long ago, and another one may never come."""
    threads, go_on = [], threading.Event()

    def begin(inputs, stream):
        def give():
            go_on.wait(WAIT_S)
            model.told = (metric(7.0),)
            stream.end()
            model.told = (metric(8.0),)
            stream.end()

        threads.append(threading.Thread(target=give))
        threads[0].start()

    model = Model(begin)
    model.told = (metric(0.0),)
    front.serve(model)
    assert isinstance(front.hear(), CustomMetrics)
    front.ask(1, 0)
    assert isinstance(front.hear(), Begun)
    go_on.set()
    assert [one.value for one in front.hear().samples] == [7.0]
    assert front.hear() == Ended(1)
    threads[0].join(WAIT_S)
    assert [one.value for one in front.hear().samples] == [8.0]
    front.nothing_more()


def test_metrics_that_cannot_be_told_end_no_stream_otherwise(front):
    model = Model(lambda inputs, stream: iter((answer(1),)))
    model.told = broken_metrics
    front.serve(model)
    front.ask(1, 0)
    assert [type(one) for one in front.hear_all(1)] == [Part, Ended]
    front.nothing_more()


def broken_metrics():
    raise RuntimeError("no metrics")


@pytest.mark.parametrize("told", [broken_metrics, (metric("many"),), (metric(1.0, labels=((1, 2),)),)])
def test_metrics_that_cannot_be_told_cost_nobody_an_answer(front, told):
    model = Model(None, lambda inputs: {"y": inputs["x"]})
    model.told = told
    front.serve(model)
    for sequence in (1, 2):
        front.ask(sequence, 5)
        assert front.output(front.hear()) == [5]
    front.nothing_more()


@pytest.mark.parametrize("by_itself", [False, True])
def test_the_worker_ends_when_the_front_process_is_gone_while_a_model_waits_for_a_slow_client(front, by_itself):
    errors, threads = [], []

    def begin(inputs, stream):
        def give():
            try:
                while True:
                    stream.send(answer(1))
            except Exception as error:
                errors.append(error)
                raise

        if not by_itself:
            give()

        def give_quietly():
            with contextlib.suppress(OSError, ConversationEnded):
                give()

        threads.append(threading.Thread(target=give_quietly))
        threads[0].start()

    front.serve(Model(begin))
    front.ask(1, 0)
    for _ in range(WINDOW + 1 if by_itself else AHEAD + 1):
        front.hear()
    front.close()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    (error,) = errors
    assert isinstance(error, OSError | ConversationEnded)
    assert isinstance(front.error, OSError | None), front.error


def test_a_conversation_is_all_that_streams_need():
    """Stream and Streams say nothing of sockets: this is the pair that main.py puts together."""
    ours, theirs = channel.pair()
    with ours, theirs:
        streams = Streams(Conversation(theirs, lambda *_: False))
        streams.begin("m", Model(lambda inputs, stream: iter(())), Calls(), 3, RequestInfo(1, "", {}), {}, nothing)
        streams.step()
        assert decode_from_worker(receive(ours)[0]) == Ended(3)
        assert not streams.runnable


# ---- a GPU that is lost ----

ASSERT = "CUDA error: device-side assert triggered"


@pytest.fixture
def driver(monkeypatch):
    """There is one, and it cannot tell whether its GPU is lost: words count."""
    monkeypatch.setattr(device_loss, "device_lost", partial(device_lost, is_well=lambda: None))


def ends_lost(front):
    """See that the worker ends itself."""
    front._thread.join(WAIT_S)
    assert isinstance(front.error, DeviceLost)
    assert ASSERT in str(front.error)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("error", [RuntimeError(ASSERT), LoadError(f"model.py fails in load: {ASSERT}")], ids=repr)
def test_a_load_that_loses_the_gpu_ends_the_worker(front, error):
    loaded, failed = front.serve(Model(execute=dict), error)
    assert isinstance(loaded, Loaded)
    assert isinstance(failed, LoadFailed)
    assert ASSERT in failed.reason
    ends_lost(front)


def test_a_warm_up_that_loses_the_gpu_is_a_load_that_failed(front):
    def execute(_):
        raise DeviceLost(ASSERT)

    model = Model(execute=execute)
    model.warms_up = True
    front._models["0"] = model
    front.tell(msgspec.structs.replace(LOAD, name="0", warmup=True))
    front._thread.start()
    failed = front.hear()
    assert isinstance(failed, LoadFailed)
    assert ASSERT in failed.reason
    ends_lost(front)


@pytest.mark.usefixtures("driver")
def test_a_stream_that_tells_of_the_loss_by_itself_ends_the_worker(front):
    def answering(_, stream):
        stream.send(Answer(error=RuntimeError(ASSERT)))
        stream.end()

    front.serve(Model(answering))
    front.ask(1, 5)
    *_, part, last = front.hear_all(1)
    assert (ASSERT in part.message, last) == (True, Ended(1))
    ends_lost(front)


@pytest.mark.usefixtures("driver")
def test_a_stream_that_ends_with_the_loss_in_another_thread_ends_the_worker(front):
    threads = []

    def begin(_, stream):
        threads.append(threading.Thread(target=stream.end, args=(RuntimeError(ASSERT),)))
        threads[0].start()

    front.serve(Model(begin))
    front.ask(1, 5)
    assert ASSERT in front.hear_all(1)[-1].message
    threads[0].join(WAIT_S)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have ended by then
        front.ask(2, 5)
    ends_lost(front)
    assert len(threads) == 1  # the second request is left to whoever comes next
