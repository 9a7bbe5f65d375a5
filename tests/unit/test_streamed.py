"""A request to a decoupled model, from the queue to its last response."""

import asyncio
import gc
import weakref
from time import monotonic_ns

import numpy as np
import pytest

from headrace.batching.response_stream import WINDOW_BYTES
from headrace.batching.streamed import StreamedRequest
from headrace.core.errors import DeadlineExceeded, InternalError, InvalidRequest
from headrace.core.request import InferRequest, InferResponse, RequestedOutput
from headrace.core.statistics import Statistics
from headrace.core.tensor import DataType, Tensor
from headrace.core.validation import ModelInputs
from headrace.workers.frames import Begun, Ended, Part
from headrace.workers.open_streams import OpenStreams

Y, Z = Tensor("y", DataType.UINT8, (1,), b"\1"), Tensor("z", DataType.UINT8, (1,), b"\2")


def streamed(*outputs, deadline_ns=0):
    request = InferRequest("m", "", "id-1", (), tuple(map(RequestedOutput, outputs)))
    made = StreamedRequest(
        request, ModelInputs((), 1, None), "3", Statistics(), asyncio.get_running_loop(), deadline_ns=deadline_ns
    )
    made.taken_at_ns = monotonic_ns()
    return made


async def settle():
    for _ in range(3):
        await asyncio.sleep(0)


async def read(pending):
    return [item async for item in pending.stream]


def refusing(outputs):
    raise InvalidRequest("it has no classes")


def broken(outputs):
    raise ZeroDivisionError("a bug")


async def test_responses_then_the_end(caplog):
    pending = streamed()
    pending.begun(5)
    pending.responded((Y,), {"k": 1}, 10)
    pending.responded((), {}, 20)
    pending.responded_badly(InternalError("not this one"), 30)
    pending.responded((Y, Z), {}, 40)
    pending.ended()
    first, empty, error, last = await read(pending)
    assert first == InferResponse("m", "3", "id-1", (Y,), {"k": 1})
    assert (empty.outputs, last.outputs) == ((), (Y, Z))
    assert str(error) == "not this one"
    assert pending.dead
    statistics = pending.statistics
    assert (statistics.success, statistics.failures, statistics.executions) == (1, {}, 1)
    assert (statistics.compute_input_ns, statistics.compute_infer_ns) == (5, 100)
    assert sorted(statistics.by_response) == [0, 1, 2, 3]
    assert pending.timings == (5, 100, 0)


async def test_what_was_not_asked_for_is_left_out_and_the_order_is_the_clients():
    pending = streamed("z", "y")
    pending.responded((Y, Z), {}, 1)
    pending.responded((Y,), {}, 1)
    pending.ended()
    assert [one.outputs for one in await read(pending)] == [(Z, Y), (Y,)]


async def test_a_form_that_a_response_cannot_have_is_an_error_in_its_place():
    pending = streamed()
    pending.form = refusing
    pending.responded((Y,), {}, 1)
    pending.form = None
    pending.responded((Z,), {}, 1)
    pending.ended()
    error, second = await read(pending)
    assert isinstance(error, InvalidRequest)
    assert second.outputs == (Z,)


async def test_so_is_a_bug_in_making_it(caplog):
    pending = streamed()
    pending.form = broken
    pending.responded((Y,), {}, 1)
    pending.ended()
    (error,) = await read(pending)
    assert isinstance(error, InternalError)
    assert "model 'm'" in str(error)
    assert "a bug" in caplog.text


async def test_a_failure_comes_after_the_responses_that_there_were():
    pending = streamed()
    pending.responded((Y,), {}, 1)
    pending.fail(InternalError("the worker died"))
    pending.fail(InternalError("only the first counts"))
    first, error = await read(pending)
    assert first.outputs == (Y,)
    assert str(error) == "the worker died"
    assert pending.statistics.failures == {"BACKEND": 1}


async def test_what_each_response_was_counted_as_is_given_back_when_it_is_read():
    pending, room = streamed(), []
    pending.stream.on_room = lambda *told: room.append(told)
    pending.responded((Y,), {}, 1, WINDOW_BYTES)
    pending.form = refusing
    pending.responded((Y,), {}, 1, WINDOW_BYTES + 1)
    pending.form = broken
    pending.responded((Y,), {}, 1, WINDOW_BYTES + 2)
    for _ in range(3):
        await anext(pending.stream)
    assert room == [(1, WINDOW_BYTES), (1, WINDOW_BYTES + 1), (1, WINDOW_BYTES + 2)]
    pending.ended()


async def test_a_client_that_leaves_takes_the_request_back():
    pending = streamed()
    pending.responded((Y,), {}, 1)
    pending.stream.cancel()
    assert pending.future.cancelled()
    assert await read(pending) == []
    pending.responded((Y,), {}, 1)
    pending.responded_badly(InternalError("late"), 1)
    pending.ended()
    await settle()
    assert await read(pending) == []
    assert pending.statistics is None, "its leaving is counted"


async def test_leaving_is_counted_once():
    pending = streamed()
    statistics = pending.statistics
    pending.future.cancel()
    await settle()
    pending.ended()
    pending.fail(InternalError("late"))
    assert statistics.failures == {"CANCELED": 1}
    assert statistics.success == 0


async def test_the_response_at_which_a_client_left_is_counted_as_such():
    pending = streamed()
    statistics = pending.statistics
    pending.responded((Y,), {}, 1)
    pending.stream.cancel()
    pending.responded((Y,), {}, 1)
    pending.ended()
    assert {index: one.cancel.count for index, one in statistics.by_response.items()} == {0: 0, 1: 0, 2: 1}


async def test_nobody_left_where_the_deadline_had_passed():
    pending = streamed(deadline_ns=monotonic_ns() - 1)
    statistics = pending.statistics
    assert len(await asyncio.wait_for(read(pending), 30)) == 1
    pending.ended()
    assert statistics.by_response == {}


async def test_the_deadline_holds_until_the_first_response():
    late = streamed(deadline_ns=monotonic_ns() - 1)
    (error,) = await asyncio.wait_for(read(late), 30)
    assert isinstance(error, DeadlineExceeded)
    late.responded((Y,), {}, 1)
    late.ended()
    assert late.statistics.failures == {"REJECTED": 1}
    assert late.statistics.success == 0

    in_time = streamed(deadline_ns=monotonic_ns() + 3_600_000_000_000)
    in_time.responded((Y,), {}, 1)
    timer = in_time._timer
    assert timer.cancelled()
    in_time.ended()
    assert len(await read(in_time)) == 1


@pytest.mark.parametrize("way", ["ended", "bad", "bury"])
async def test_no_timer_is_left(way):
    pending = streamed(deadline_ns=monotonic_ns() + 3_600_000_000_000)
    timer = pending._timer
    if way == "ended":
        pending.ended()
    elif way == "bad":
        pending.responded_badly(InternalError("no"), 1)
        pending.ended()
    else:
        pending.stream.cancel()
        pending.bury()
    assert timer.cancelled()
    await settle()


async def test_what_the_queue_may_do_with_any_request_works_with_this_one():
    pending = streamed()
    assert not pending.dead
    assert (pending.rows, pending.alone) == (1, False)
    pending.stream.cancel()
    assert pending.dead


@pytest.mark.parametrize("how", ["ended", "failed", "left", "left before it was begun"])
async def test_one_that_is_over_is_held_by_nobody(how):
    pending = streamed()
    memory = np.zeros(1, np.uint8)
    freed = weakref.ref(memory)
    pending.inputs = ModelInputs((Tensor("x", DataType.UINT8, (1,), memory.data),), 1, None)
    streams = OpenStreams("m")
    gc.disable()
    try:
        if how == "left before it was begun":
            pending.stream.cancel()
        streams.begin(Begun(7, 0), pending, lambda _: None)
        streams.part(Part(7, (), {}))
        if how == "left":
            pending.stream.cancel()
        await settle()
        streams.end(Ended(7, "internal" if how == "failed" else "", ""))
        await settle()
        await read(pending)
        del pending, memory
        assert freed() is None
    finally:
        gc.enable()
