"""The decoupled requests of one instance, as frames about them come and their clients read and leave."""

import asyncio
from time import monotonic_ns

import pytest

from headrace.batching.response_stream import WINDOW, WINDOW_BYTES
from headrace.batching.streamed import StreamedRequest
from headrace.core.errors import InternalError, InvalidRequest, Overloaded
from headrace.core.request import InferRequest
from headrace.core.statistics import Statistics
from headrace.core.tensor import DataType, Tensor
from headrace.core.validation import ModelInputs
from headrace.workers import open_streams
from headrace.workers.frames import Begun, Cancel, Credit, Ended, NamedTensor, Part
from headrace.workers.open_streams import OpenStreams


class Open:
    """Streams, and what the worker was told about them."""

    def __init__(self):
        self.told = []
        self.streams = OpenStreams("m")

    def begin(self, sequence, deadline_ns=0):
        request = InferRequest("m", "", f"r-{sequence}", ())
        pending = StreamedRequest(
            request,
            ModelInputs((), 1, None),
            "1",
            Statistics(),
            asyncio.get_running_loop(),
            deadline_ns=deadline_ns,
        )
        self.streams.begin(Begun(sequence, 5), pending, self.told.append)
        return pending

    def part(self, sequence, *values, **more):
        self.streams.part(Part(sequence, (NamedTensor("y", "UINT8", (len(values),), bytes(values)),), {"k": 1}, **more))


@pytest.fixture
async def opened():
    return Open()


async def settle():
    for _ in range(3):
        await asyncio.sleep(0)


async def read(pending):
    return [item async for item in pending.stream]


async def test_parts_go_to_their_request_and_the_end_gives_it_back(opened):
    one, other = opened.begin(1), opened.begin(2)
    opened.part(1, 5)
    opened.part(2, 6)
    opened.part(1, 7)
    opened.streams.part(Part(1, (), {}, 9, Overloaded.kind.value, "not now"))
    assert opened.streams.end(Ended(1)) is one
    assert len(opened.streams) == 1
    first, second, error = await read(one)
    assert first.outputs == (Tensor("y", DataType.UINT8, (1,), b"\5"),)
    assert first.parameters == {"k": 1}
    assert second.outputs[0].data == b"\7"
    assert isinstance(error, Overloaded)
    assert str(error) == "model 'm': not now"
    assert opened.streams.end(Ended(2)) is other
    await settle()
    assert opened.told == []


async def test_an_end_may_be_an_error(opened):
    pending = opened.begin(1)
    assert opened.streams.end(Ended(1, "overloaded", "no")) is pending
    (error,) = await read(pending)
    assert isinstance(error, Overloaded)


async def test_the_worker_is_told_of_room_as_the_client_reads(opened):
    pending = opened.begin(1)
    assert opened.streams.awaited is True
    for number in range(WINDOW):
        opened.part(1, number)
    assert opened.streams.awaited is False, "the client has to read first"
    for _ in range(WINDOW // 2):
        await anext(pending.stream)
    assert opened.told == [Credit(1, WINDOW // 2, WINDOW // 2)]
    assert opened.streams.awaited is True
    opened.streams.end(Ended(1))
    await read(pending)
    assert opened.told == [Credit(1, WINDOW // 2, WINDOW // 2)], "who has ended needs no room"
    assert opened.streams.awaited is False


async def test_bytes_are_room_as_well(opened):
    pending = opened.begin(1)
    opened.part(1, *bytes(WINDOW_BYTES - 1))
    assert opened.streams.awaited is True
    opened.streams.part(Part(1, (), {}, 9, Overloaded.kind.value, "without a byte"))
    assert opened.streams.awaited is True
    opened.part(1, 5)
    assert opened.streams.awaited is False, "the client has to read first"
    await anext(pending.stream)
    assert opened.told == [Credit(1, 1, WINDOW_BYTES - 1)]
    assert opened.streams.awaited is True
    opened.streams.end(Ended(1))


async def test_one_response_may_be_larger_than_the_window(opened):
    pending = opened.begin(1)
    opened.part(1, *bytes(WINDOW_BYTES + 5))
    assert opened.streams.awaited is False
    await anext(pending.stream)
    assert opened.told == [Credit(1, 1, WINDOW_BYTES + 5)]
    assert opened.streams.awaited is True
    opened.streams.end(Ended(1))


async def test_a_response_without_its_form_gives_its_bytes_back(opened):
    def refuse(outputs):
        raise InvalidRequest("it has no classes")

    pending = opened.begin(1)
    pending.form = refuse
    opened.part(1, *bytes(WINDOW_BYTES))
    assert isinstance(await anext(pending.stream), InvalidRequest)
    assert opened.told == [Credit(1, 1, WINDOW_BYTES)]
    assert opened.streams.awaited is True
    opened.streams.end(Ended(1))


async def test_the_time_in_which_no_client_had_room_is_not_the_models(opened, monkeypatch):
    """Its silence is counted from when somebody has room again, and not from what it said last."""
    now = 100.0
    monkeypatch.setattr(open_streams, "monotonic", lambda: now)
    slow, other = opened.begin(1), opened.begin(2)
    assert opened.streams.awaited_since == 0
    for number in range(WINDOW):
        opened.part(1, number)
    now = 150.0
    for _ in range(WINDOW // 2):
        await anext(slow.stream)
    assert opened.streams.awaited_since == 0, "the other one had room all the time"
    for pending, sequence, count in ((slow, 1, WINDOW // 2), (other, 2, WINDOW)):
        for number in range(count):
            opened.part(sequence, number)
        assert len(opened.told) == 1, pending
    now = 200.0
    for _ in range(WINDOW // 2):
        await anext(other.stream)
    assert opened.streams.awaited_since == 200
    now = 250.0
    for _ in range(WINDOW // 2):
        await anext(other.stream)
    assert opened.streams.awaited_since == 200
    for sequence in (1, 2):
        opened.streams.end(Ended(sequence))


async def test_one_slow_client_does_not_hide_that_another_is_waited_for(opened):
    opened.begin(1)
    opened.begin(2)
    for number in range(WINDOW):
        opened.part(1, number)
    assert opened.streams.awaited is True
    opened.streams.end(Ended(2))
    assert opened.streams.awaited is False


async def test_the_worker_is_told_of_a_client_that_has_left(opened):
    pending = opened.begin(1)
    pending.stream.cancel()
    await settle()
    assert opened.told == [Cancel(1)]
    opened.part(1, 5)
    assert opened.streams.end(Ended(1)) is pending
    assert await read(pending) == []
    await settle()
    assert opened.told == [Cancel(1)]


async def test_and_of_a_deadline_that_has_passed(opened):
    pending = opened.begin(1, deadline_ns=monotonic_ns() - 1)
    assert len(await asyncio.wait_for(read(pending), 30)) == 1
    await settle()
    assert opened.told == [Cancel(1)]
    assert opened.streams.end(Ended(1)) is pending


async def test_frames_about_a_request_that_nobody_knows_are_nothing(opened):
    pending = opened.begin(1)
    opened.streams.end(Ended(1))
    opened.part(1, 5)
    opened.part(77, 5)
    assert opened.streams.end(Ended(1)) is None
    assert opened.streams.end(Ended(77)) is None
    assert await read(pending) == []


async def test_when_the_worker_dies_each_is_told_after_what_it_was_given(opened):
    one, other = opened.begin(1), opened.begin(2)
    opened.part(1, 5)
    left = opened.begin(3)
    left.stream.cancel()
    assert list(opened.streams.lose("signal SIGKILL")) == [one, other, left]
    assert len(opened.streams) == 0
    first, error = await read(one)
    assert first.outputs[0].data == b"\5"
    assert isinstance(error, InternalError)
    assert "signal SIGKILL" in str(error)
    assert len(await read(other)) == 1
    await settle()
    assert opened.told == [], "nobody is there to be told"


async def test_the_next_worker_is_not_told_about_requests_of_the_one_before(opened):
    pending = opened.begin(1)
    for number in range(WINDOW):
        opened.part(1, number)
    list(opened.streams.lose("signal SIGKILL"))
    assert len(await read(pending)) == WINDOW + 1
    pending.stream.cancel()
    await settle()
    assert opened.told == []
