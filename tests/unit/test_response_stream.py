"""Responses between whoever makes them and the one task that reads them."""

import asyncio

import pytest

from headrace.batching.response_stream import WINDOW, WINDOW_BYTES, ResponseStream, single_response
from headrace.core.errors import InternalError, NotReady
from headrace.core.request import InferResponse


def response(number):
    return InferResponse("m", "1", str(number), ())


@pytest.fixture
def stream():
    made = ResponseStream(decoupled=True)
    made.room, made.cancels = [], 0
    made.on_room = lambda *room: made.room.append(room)

    def on_cancel():
        made.cancels += 1

    made.on_cancel = on_cancel
    return made


async def settle():
    for _ in range(3):
        await asyncio.sleep(0)


async def read(stream):
    return [item async for item in stream]


async def test_what_was_put_is_read_in_its_order_errors_too(stream):
    items = [response(1), InternalError("no"), response(2)]
    for item in items:
        stream.put(item)
    stream.end()
    assert await read(stream) == items
    assert await anext(stream, None) is None
    assert stream.cancels == 0


@pytest.mark.parametrize("how", ["put", "end", "cancel"])
async def test_a_reader_that_waits_is_woken(stream, how):
    reading = asyncio.get_running_loop().create_task(anext(stream, None))
    await settle()
    assert not reading.done()
    if how == "put":
        stream.put(response(1))
    else:
        getattr(stream, how)()
    assert await asyncio.wait_for(reading, 30) == (response(1) if how == "put" else None)


async def test_a_reader_may_give_up_waiting_and_read_on_later(stream):
    reading = asyncio.get_running_loop().create_task(anext(stream, None))
    await settle()
    reading.cancel()
    await settle()
    stream.put(response(1))
    stream.end()
    assert await read(stream) == [response(1)]


async def test_room_is_told_of_for_every_half_of_the_window_that_was_read(stream):
    for number in range(2 * WINDOW):
        stream.put(response(number))
    for number in range(2 * WINDOW):
        await anext(stream)
        assert stream.room == [(WINDOW // 2, 0)] * ((number + 1) // (WINDOW // 2))
    for _ in range(WINDOW):
        stream.put(InternalError("an error takes room too"))
        await anext(stream)
    assert stream.room == [(WINDOW // 2, 0)] * 6


async def test_and_for_every_quarter_of_the_window_in_bytes(stream):
    quarter = WINDOW_BYTES // 4
    for nbytes in (quarter - 1, 1, quarter - 1, quarter, 3 * WINDOW_BYTES, 1):
        stream.put(response(1), nbytes)
    told = []
    for _ in range(6):
        await anext(stream)
        told.append(list(stream.room))
        stream.room.clear()
    assert told == [[], [(2, quarter)], [], [(2, 2 * quarter - 1)], [(1, 3 * WINDOW_BYTES)], []]


async def test_whichever_comes_first_both_are_counted_anew(stream):
    """After a large response the next half of a window is sixteen small ones, and not what was left of it."""
    for nbytes in (*[10] * 10, WINDOW_BYTES, *[10] * (WINDOW // 2)):
        stream.put(response(1), nbytes)
    for _ in range(10 + WINDOW // 2):
        await anext(stream)
    assert stream.room == [(11, WINDOW_BYTES + 100)]
    await anext(stream)
    assert stream.room[1:] == [(WINDOW // 2, 10 * (WINDOW // 2))]


async def test_after_the_end_nobody_needs_to_know_of_room(stream):
    for number in range(WINDOW):
        stream.put(response(number), WINDOW_BYTES)
    stream.end()
    assert len(await read(stream)) == WINDOW
    assert stream.room == []


async def test_cancelling_tells_the_maker_once_and_forgets_what_is_there(stream):
    stream.put(response(1))
    stream.cancel()
    stream.cancel()
    assert stream.cancels == 1
    assert await read(stream) == []


async def test_cancelling_at_the_end_is_nothing(stream):
    stream.put(response(1))
    stream.end()
    stream.cancel()
    assert stream.cancels == 0
    assert await read(stream) == [response(1)]


@pytest.mark.parametrize("how", ["end", "cancel"])
async def test_nothing_comes_after_the_end(stream, how):
    getattr(stream, how)()
    stream.put(response(1))
    stream.end()
    assert await read(stream) == []


# -- the stream of a request that is answered once --


async def items(stream):
    return [item async for item in stream]


async def test_a_single_response_is_all_that_its_stream_has():
    future = asyncio.get_running_loop().create_future()
    stream = single_response(future)
    assert not stream.decoupled
    future.set_result(response(1))
    assert await items(stream) == [response(1)]


async def test_an_error_comes_in_its_place_and_a_bug_as_an_internal_one():
    loop = asyncio.get_running_loop()
    for error, kind in ((NotReady("it is being loaded"), NotReady), (ValueError("a bug"), InternalError)):
        future = loop.create_future()
        stream = single_response(future)
        future.set_exception(error)
        (item,) = await items(stream)
        assert type(item) is kind
        assert str(item) == str(error)


async def test_who_reads_on_no_more_takes_the_request_back():
    future = asyncio.get_running_loop().create_future()
    stream = single_response(future)
    stream.cancel()
    assert future.cancelled()
    assert await items(stream) == []


async def test_a_request_that_is_taken_back_ends_its_stream():
    future = asyncio.get_running_loop().create_future()
    stream = single_response(future)
    future.cancel()
    assert await items(stream) == []
