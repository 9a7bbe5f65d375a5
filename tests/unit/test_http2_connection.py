"""A connection against h2 and against frames by hand: windows, turns, faults, floods and every way to end."""

import h2.events
import pytest
from unit.http2_client import HELLO, FakeStream, H2Client, Server, frame, turns

from headrace.http2 import client_frames, frames, outgoing
from headrace.http2 import connection as module
from headrace.http2.client_frames import CONNECTION_WINDOW, MAX_IDLE_FRAMES, STREAM_WINDOW
from headrace.http2.frames import ErrorCode
from headrace.http2.headers import header_block
from headrace.http2.incoming import FRAME_BYTES, MAX_PIECES, TURN_FRAMES
from headrace.http2.outgoing import TRANSPORT_BYTES, TURN_BYTES

HEAD = header_block([(b":status", b"200"), (b"content-type", b"application/grpc")])
END = header_block([(b"grpc-status", b"0")])
ENDED = frames.END_HEADERS | frames.END_STREAM


def echo(stream: FakeStream) -> None:
    stream.carrier.respond(stream, HEAD, (stream.body[:5], stream.body[5:]), len(stream.body), END)


def data(number: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return frame(frames.DATA, flags, number, payload)


def resets(server: Server) -> dict[int, int]:
    """The streams that the server has reset, and why."""
    return {one.stream: int.from_bytes(one.payload, "big") for one in server.heard(frames.RST_STREAM)}


def goaway(server: Server) -> tuple[int, ErrorCode] | None:
    found = server.heard(frames.GOAWAY)
    if not found:
        return None
    return int.from_bytes(found[-1].payload[:4], "big"), ErrorCode(int.from_bytes(found[-1].payload[4:8], "big"))


# -- with h2 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 6, 16_384, 16_385, 70_000, 3_000_000, 9_000_000])
async def test_what_is_sent_comes_back(size):
    client = H2Client(Server(silent=True, on_end=echo))
    body = bytes(range(256)) * (size // 256 + 1)
    number = client.request(body[:size])
    assert client.body(number) == body[:size]
    assert client.ended(number)
    (trailers,) = [one for one in client.events if isinstance(one, h2.events.TrailersReceived)]
    assert trailers.headers == [("grpc-status", "0")]
    assert not client.server.connection._streams
    assert client.server.connection._unsent_bytes == 0


async def test_a_conversation_works_wherever_it_is_cut():
    whole = HELLO + Server(silent=True).headers(1) + data(1, b"hello world", frames.END_STREAM)
    for cut in range(len(whole)):
        server = Server(silent=True, on_end=echo)
        server.say(whole[:cut])
        server.say(whole[cut:])
        assert server.streams[1].body == b"hello world", cut
    server = Server(silent=True, on_end=echo)
    for position in range(len(whole)):
        server.say(whole[position : position + 1])
    assert b"".join(one.payload for one in server.heard(frames.DATA)) == b"hello world"


async def test_a_window_of_one_byte_is_enough():
    client = H2Client(Server(silent=True, on_end=echo), INITIAL_WINDOW_SIZE=1)
    number = client.request(b"0123456789")
    assert client.body(number) == b"0123456789"
    assert client.ended(number)


async def test_a_window_that_shrinks_below_nothing_is_waited_for():
    client = H2Client(Server(silent=True, on_end=echo), INITIAL_WINDOW_SIZE=1000)
    number = client.request(bytes(5000))
    assert len(client.body(number, acknowledge=False)) == 1000
    client.h2.update_settings({4: 0})
    client.exchange()
    stream = client.server.streams[number]
    assert stream.send_window == -1000
    client.server.say(frames.window_update(number, 900))
    assert not client.server.heard(frames.DATA)
    client.server.say(frames.window_update(number, 200))
    assert [len(one.payload) for one in client.server.heard(frames.DATA)] == [100]
    client.server.say(frame(frames.SETTINGS, 0, 0, b"\0\4\0\1\0\0"))
    assert sum(len(one.payload) for one in client.server.heard(frames.DATA)) == 3900
    assert stream.over


# -- turns ------------------------------------------------------------------------------------------------


def _stalled(server: Server, count: int, size: int) -> list[int]:
    """Responses of which nothing can be sent: the windows of the streams have room, the connection's has none."""
    server.say(frame(frames.SETTINGS, 0, 0, b"\0\4\x7f\xff\xff\xff"))
    server.connection._send_window = 0
    numbers = list(range(1, 2 * count, 2))
    for number in numbers:
        stream = server.open(number)
        stream.carrier.respond(stream, HEAD, (bytes(size),), size, END)
    server.heard()
    return numbers


async def test_streams_that_wait_for_the_same_room_take_turns():
    server = Server()
    numbers = _stalled(server, 4, 10 * TURN_BYTES)
    server.say(frames.window_update(0, 8 * TURN_BYTES))
    sent = dict.fromkeys(numbers, 0)
    for one in server.heard(frames.DATA):
        sent[one.stream] += len(one.payload)
        assert max(sent.values()) - min(sent.values()) <= TURN_BYTES
    assert set(sent.values()) == {2 * TURN_BYTES}
    server.say(frames.window_update(0, 32 * TURN_BYTES))
    assert all(server.streams[number].over for number in numbers)
    assert server.connection._unsent_bytes == 0


async def test_a_small_response_does_not_wait_for_a_large_one():
    server = Server()
    _stalled(server, 1, 100 * TURN_BYTES)
    small = server.open(3)
    small.carrier.respond(small, HEAD, (b"small",), 5, END)
    server.say(frames.window_update(0, 2 * TURN_BYTES))
    assert small.over


async def test_room_for_one_byte_costs_one_stream_whatever_the_number_of_those_that_wait():
    server = Server()
    numbers = _stalled(server, 1000, 100)
    looked_at = []
    original = outgoing.Outgoing._send_frames
    server.connection._send_frames = lambda stream, *more: (
        looked_at.append(stream.id),
        original(server.connection, stream, *more),
    )
    for _ in range(10):
        server.say(frames.window_update(0, 1))
    assert looked_at == numbers[:10]


async def test_a_stream_without_a_window_of_its_own_is_not_in_the_way():
    server = Server()
    server.say(frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0"))
    for number in (1, 3):
        stream = server.open(number)
        stream.carrier.respond(stream, HEAD, (b"12345",), 5, END)
    assert not server.connection._waiting
    server.say(frames.window_update(3, 5))
    assert (server.streams[1].over, server.streams[3].over) == (False, True)
    server.say(frames.window_update(1, 5))
    assert server.streams[1].over


async def test_only_so_much_is_handed_to_a_socket_that_takes_nothing():
    server = Server()
    server.say(frame(frames.SETTINGS, 0, 0, b"\0\4\x7f\xff\xff\xff") + frames.window_update(0, 2**30))
    server.transport.holding = True
    for number in (1, 3):
        stream = server.open(number)
        stream.carrier.respond(stream, HEAD, (bytes(5_000_000),), 5_000_000, END)
    small = server.open(5)
    small.carrier.respond(small, HEAD, (b"12345",), 5, END)
    assert server.transport.held < TRANSPORT_BYTES + TURN_BYTES
    assert server.transport.reading, "cancellations and windows are still heard"
    rounds = 0
    while server.connection._streams:
        server.transport.release()
        rounds += 1
        if rounds == 1:
            assert small.over
        assert server.transport.held < TRANSPORT_BYTES + 2 * TURN_BYTES
    assert sum(len(one.payload) for one in server.heard(frames.DATA)) == 10_000_005


async def test_a_client_that_reads_nothing_is_not_answered_into_memory():
    server = Server()
    server.transport.holding = True
    sent = 0
    while server.transport.reading:
        server.say(frames.ping(b"12345678") * TURN_FRAMES)
        sent += 1
        assert sent < 1000
        if server.connection._put_off:
            await turns(1)
    assert server.transport.held < 3 * TRANSPORT_BYTES
    server.transport.release()
    assert server.transport.reading


async def test_responses_that_a_client_makes_no_room_for_cost_it_its_next_requests(monkeypatch):
    monkeypatch.setattr(client_frames, "MAX_UNSENT_BYTES", 1000)
    server = Server()
    server.say(frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0"))
    stream = server.open(1)
    stream.carrier.respond(stream, HEAD, (bytes(2000),), 2000, END)
    server.say(server.headers(3))
    assert resets(server) == {3: ErrorCode.REFUSED_STREAM}
    server.say(frames.rst_stream(1, ErrorCode.CANCEL))
    assert server.open(5)


async def test_many_frames_at_once_are_dealt_with_in_turns():
    server = Server()
    server.say(frames.ping(b"12345678") * (3 * TURN_FRAMES))
    assert not server.transport.reading
    assert len(server.heard(frames.PING)) == TURN_FRAMES
    server.say(frames.ping(b"87654321"))  # was on its way already
    await turns(4)
    pings = server.heard(frames.PING)
    assert len(pings) == 2 * TURN_FRAMES + 1
    assert pings[-1].payload == b"87654321"
    assert server.transport.reading


async def test_a_connection_that_is_lost_has_no_turn():
    server = Server()
    server.say(frames.ping(b"12345678") * (3 * TURN_FRAMES))
    server.connection.connection_lost(None)
    server.heard()
    await turns()
    assert not server.heard()


async def test_a_frame_in_tiny_pieces_is_not_kept_in_tiny_pieces():
    server = Server()
    stream = server.open(1, ended=False)
    whole = data(1, bytes(FRAME_BYTES), frames.END_STREAM)
    for position in range(0, len(whole), 37):
        server.say(whole[position : position + 37])
        assert len(server.connection._rest) <= MAX_PIECES
    assert stream.body == bytes(FRAME_BYTES)


async def test_who_waits_for_room_goes_on_when_there_is_some_or_never_will_be():
    for last in (frames.window_update(1, 10), frames.rst_stream(1, ErrorCode.CANCEL)):
        server = Server()
        server.say(frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0"))
        stream = server.open(1)
        stream.headers(HEAD)
        stream.send(b"12345", b"", b"67890")
        waiting = stream.drained()
        assert waiting.send(None) is not None, "it waits"
        server.say(last)
        await turns()
        with pytest.raises(StopIteration):
            waiting.send(None)
    await stream.drained()


# -- what clients send ------------------------------------------------------------------------------------


async def test_padding_counts_and_is_taken_off():
    server = Server()
    stream = server.open(1, ended=False)
    server.say(data(1, b"\x0aabc" + bytes(10), frames.PADDED))
    assert stream.body == b"abc"
    assert stream.receivable == STREAM_WINDOW - 14 + 3


async def test_room_for_all_streams_is_given_back_also_for_what_nobody_wants():
    server = Server()
    server.open(1, ended=False).abort(ErrorCode.CANCEL)
    granted = 0
    for _ in range(2 * CONNECTION_WINDOW // FRAME_BYTES):
        server.say(data(1, bytes(FRAME_BYTES)))
        granted += sum(int.from_bytes(one.payload, "big") for one in server.heard(frames.WINDOW_UPDATE))
    assert granted > CONNECTION_WINDOW


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_headers_may_come_in_pieces(count):
    server = Server()
    block = server.headers(1)[9:]
    first, *rest = [block[index::count] for index in range(count)] if count == 1 else _cut(block, count)
    kinds = [(frames.HEADERS, first), *((frames.CONTINUATION, one) for one in rest)]
    for index, (kind, piece) in enumerate(kinds):
        flags = (frames.END_STREAM if kind == frames.HEADERS else 0) | (
            frames.END_HEADERS if index == len(kinds) - 1 else 0
        )
        server.say(frame(kind, flags, 1, piece))
    assert (b"te", b"trailers") in server.streams[1].head
    assert server.streams[1].remote_ended


def _cut(block: bytes, count: int) -> list[bytes]:
    size = len(block) // count + 1
    return [block[start : start + size] for start in range(0, len(block), size)]


async def test_padding_and_priority_in_headers_are_passed_over():
    server = Server()
    block = server.headers(1)[9:]
    flags = frames.END_HEADERS | frames.PADDED | frames.WITH_PRIORITY
    server.say(frame(frames.HEADERS, flags, 1, b"\x05" + b"\0\0\0\0\x10" + block + bytes(5)))
    assert (b"te", b"trailers") in server.streams[1].head


async def test_trailers_end_a_request():
    server = Server(on_end=echo)
    server.open(1, ended=False)
    server.say(data(1, b"hello"), frame(frames.HEADERS, ENDED, 1, b"\x00\x01x\x01y"))
    assert server.streams[1].over
    assert b"".join(one.payload for one in server.heard(frames.DATA)) == b"hello"


async def test_a_response_before_the_end_of_the_request_stops_the_client():
    server = Server()
    stream = server.open(1, ended=False)
    stream.carrier.respond(stream, HEAD, (b"no",), 2, END)
    assert resets(server) == {1: ErrorCode.NO_ERROR}
    server.say(
        data(1, b"more"),
        frames.window_update(1, 5),
        frame(frames.HEADERS, ENDED, 1, b"\x00\x01x\x01y"),
        frames.rst_stream(1, ErrorCode.CANCEL),
    )
    assert stream.body == b""
    assert stream.losses == 0
    assert not server.heard()
    assert server.open(3)


async def test_a_request_that_is_taken_back_at_once_is_lost_once_and_its_answer_is_not_sent():
    server = Server()
    server.say(server.headers(1, ENDED), frames.rst_stream(1, ErrorCode.CANCEL), frames.rst_stream(1, ErrorCode.CANCEL))
    stream = server.streams[1]
    assert stream.losses == 1
    echo(stream)
    stream.headers(HEAD)
    stream.send(b"x")
    stream.end(END)
    stream.abort(ErrorCode.CANCEL)
    assert not server.heard()


async def test_only_the_first_end_counts():
    server = Server()
    server.say(frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0"))
    stream = server.open(1)
    stream.headers(HEAD)
    stream.send(b"1234")
    stream.end(END)
    stream.send(b"5678")
    stream.end(b"\x88")
    server.heard()
    server.say(frames.window_update(1, 100))
    body, trailers = server.heard()
    assert (body.payload, trailers.payload, trailers.flags) == (b"1234", END, ENDED)


async def test_settings_that_are_not_known_are_acknowledged_and_frames_that_are_not_known_ignored():
    server = Server()
    server.say(frame(frames.SETTINGS, 0, 0, b"\x00\x77\0\0\0\1"), frame(0x77, 0xFF, 3, b"x"), frame(0xFA, 0, 0))
    assert [(one.kind, one.flags) for one in server.heard()] == [(frames.SETTINGS, frames.ACK)]
    server.say(frame(frames.PRIORITY, 0, 9, bytes(5)), frame(frames.GOAWAY, 0, 0, bytes(8)))
    assert server.open(1)


@pytest.mark.parametrize("size", [0, 1000, 4096, 100_000])
async def test_a_client_may_have_any_memory_for_headers(size):
    """One that makes its table smaller must be told with the next headers, or it takes them for broken."""
    client = H2Client(Server(silent=True, on_end=echo), HEADER_TABLE_SIZE=size)
    for body in (b"hello", bytes(100_000)):
        number = client.request(body)
        assert client.body(number) == body
        assert client.ended(number)


ANSWERS = {"whole": echo, "trailers": lambda stream: stream.end(END), "pieces": lambda stream: stream.headers(HEAD)}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_that_nothing_is_in_the_table_of_headers_is_said_once(answer):
    server = Server(on_end=answer)
    for settings, begins in [
        (b"\0\1\0\0\x20\0", False),
        (b"\0\1\0\0\x03\xe8", True),
        (b"\0\1\0\0\0\0", False),
        (b"\0\1\0\0\x20\0\0\1\0\0\0\0", False),
    ]:
        server.say(frame(frames.SETTINGS, 0, 0, settings))
        number = 2 * len(server.streams) + 1
        server.open(number)
        first, *others = server.heard(frames.HEADERS)
        assert first.payload.startswith(b"\x20") is begins
        assert first.payload.removeprefix(b"\x20") in (HEAD, END)
        assert [one.payload for one in others] in ([], [END])


async def test_a_ping_is_answered():
    server = Server()
    server.say(frames.ping(b"abcdefgh"), frames.ping(b"stopping", frames.ACK))
    assert [(one.kind, one.flags, one.payload) for one in server.heard()] == [(frames.PING, frames.ACK, b"abcdefgh")]


# -- faults -----------------------------------------------------------------------------------------------

HEADERS_1 = frames.END_HEADERS, 1
FAULTS = {
    "data on no stream": (data(0, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data before headers": (data(7, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data on a server's stream": (data(2, b"x"), ErrorCode.PROTOCOL_ERROR),
    "more padding than data": (data(1, b"\x09abc", frames.PADDED), ErrorCode.PROTOCOL_ERROR),
    "headers on no stream": (frame(frames.HEADERS, ENDED, 0, b"\x88"), ErrorCode.PROTOCOL_ERROR),
    "headers on a server's stream": (frame(frames.HEADERS, ENDED, 8, b"\x88"), ErrorCode.PROTOCOL_ERROR),
    "headers on an old server's stream": (frame(frames.HEADERS, ENDED, 2, b"\x88"), ErrorCode.PROTOCOL_ERROR),
    "a header block that cannot be read": (frame(frames.HEADERS, ENDED, 5, b"\xff\xff"), ErrorCode.COMPRESSION_ERROR),
    "headers in the middle of headers": (
        frame(frames.HEADERS, 0, 5, b"\x88") + frame(frames.HEADERS, ENDED, 7, b"\x88"),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a ping in the middle of headers": (
        frame(frames.HEADERS, 0, 5, b"\x88") + frames.ping(b"12345678"),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "another stream's continuation": (
        frame(frames.HEADERS, 0, 5, b"\x88") + frame(frames.CONTINUATION, 4, 7, b"\x88"),
        ErrorCode.PROTOCOL_ERROR,
    ),
    "a continuation of nothing": (frame(frames.CONTINUATION, 4, 1, b"\x88"), ErrorCode.PROTOCOL_ERROR),
    "continuations without end": (
        frame(frames.HEADERS, 0, 5, b"\x88") + frame(frames.CONTINUATION, 0, 5) * 200,
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "headers too large": (frame(frames.HEADERS, ENDED, 5, bytes(140_000)), ErrorCode.ENHANCE_YOUR_CALM),
    "headers too large in pieces": (
        frame(frames.HEADERS, 0, 5, bytes(80_000)) + frame(frames.CONTINUATION, 0, 5, bytes(80_000)),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "a priority too short": (frame(frames.HEADERS, ENDED | 0x20, 5, b"\0\0"), ErrorCode.PROTOCOL_ERROR),
    "a push": (frame(frames.PUSH_PROMISE, 4, 1, bytes(5)), ErrorCode.PROTOCOL_ERROR),
    "a frame too large": (frames.header(FRAME_BYTES + 1, frames.DATA, 0, 1), ErrorCode.FRAME_SIZE_ERROR),
    "the largest frame there is": (b"\xff\xff\xff\0\0\0\0\0\1", ErrorCode.FRAME_SIZE_ERROR),
    "a reset of a stream not open": (frames.rst_stream(9, ErrorCode.CANCEL), ErrorCode.PROTOCOL_ERROR),
    "a reset of no stream": (frames.rst_stream(0, ErrorCode.CANCEL), ErrorCode.PROTOCOL_ERROR),
    "a reset of five bytes": (frame(frames.RST_STREAM, 0, 1, bytes(5)), ErrorCode.FRAME_SIZE_ERROR),
    "a ping on a stream": (frame(frames.PING, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "a ping of seven bytes": (frame(frames.PING, 0, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR),
    "settings on a stream": (frame(frames.SETTINGS, 0, 1), ErrorCode.PROTOCOL_ERROR),
    "settings of five bytes": (frame(frames.SETTINGS, 0, 0, bytes(5)), ErrorCode.FRAME_SIZE_ERROR),
    "an acknowledgement with a payload": (frame(frames.SETTINGS, 1, 0, bytes(6)), ErrorCode.FRAME_SIZE_ERROR),
    "too large a window": (frame(frames.SETTINGS, 0, 0, b"\0\4\x80\0\0\0"), ErrorCode.FLOW_CONTROL_ERROR),
    "a stream's window too large by settings": (
        frames.window_update(1, 2**31 - 1 - 65_535) + frame(frames.SETTINGS, 0, 0, b"\0\4\0\1\0\0"),
        ErrorCode.FLOW_CONTROL_ERROR,
    ),
    "too small a frame size": (frame(frames.SETTINGS, 0, 0, b"\0\5\0\0\0\1"), ErrorCode.PROTOCOL_ERROR),
    "an update by nothing": (frames.window_update(0, 0), ErrorCode.PROTOCOL_ERROR),
    "an update to more than there can be": (frames.window_update(0, 2**31 - 1), ErrorCode.FLOW_CONTROL_ERROR),
    "an update of a stream not open": (frames.window_update(9, 1), ErrorCode.PROTOCOL_ERROR),
    "an update of three bytes": (frame(frames.WINDOW_UPDATE, 0, 0, bytes(3)), ErrorCode.FRAME_SIZE_ERROR),
    "a priority on no stream": (frame(frames.PRIORITY, 0, 0, bytes(5)), ErrorCode.PROTOCOL_ERROR),
    "a priority of four bytes": (frame(frames.PRIORITY, 0, 1, bytes(4)), ErrorCode.FRAME_SIZE_ERROR),
    "a goaway on a stream": (frame(frames.GOAWAY, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "more than the stream's window": (data(1, bytes(FRAME_BYTES)) * 5, ErrorCode.FLOW_CONTROL_ERROR),
    "empty data without end": (data(1) * (MAX_IDLE_FRAMES + 10), ErrorCode.ENHANCE_YOUR_CALM),
    "priorities without end": (
        frame(frames.PRIORITY, 0, 1, bytes(5)) * (MAX_IDLE_FRAMES + 10),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "unknown frames without end": (frame(0x99, 0, 0) * (MAX_IDLE_FRAMES + 10), ErrorCode.ENHANCE_YOUR_CALM),
    "settings without end": (frame(frames.SETTINGS, 0, 0) * 1500, ErrorCode.ENHANCE_YOUR_CALM),
}


async def test_a_request_with_too_many_headers_is_the_only_one_that_suffers():
    server = Server(on_end=echo)
    first = server.open(1, ended=False)
    server.heard()
    large = header_block([(b":method", b"POST"), (b"x", b"v" * 70_000)])
    server.say(frame(frames.HEADERS, ENDED, 3, large))
    assert resets(server) == {3: ErrorCode.ENHANCE_YOUR_CALM}
    server.say(frame(frames.HEADERS, ENDED, 1, large))
    assert resets(server) == {1: ErrorCode.ENHANCE_YOUR_CALM}
    assert first.losses == 1
    server.open(5, ended=False)
    server.say(data(5, b"hello", frames.END_STREAM))
    assert b"".join(one.payload for one in server.heard(frames.DATA)) == b"hello"


async def test_responses_of_one_turn_leave_in_one_write_and_in_their_order():
    server = Server(on_end=echo)
    for number in (1, 3, 5, 7):
        server.open(number, ended=False)
    server.heard()
    writes = []
    write = server.transport.write
    server.transport.write = lambda piece: (writes.append(len(piece)), write(piece))
    for number in (5, 1, 3):
        server.say(data(number, b"%d" % number, frames.END_STREAM))
    assert writes == []
    await turns(2)
    assert len(writes) == 1
    assert [one.payload for one in server.heard(frames.DATA)] == [b"5", b"1", b"3"]
    server.say(data(7, b"7", frames.END_STREAM))
    assert [one.payload for one in server.heard(frames.DATA)] == [b"7"], "one that is alone does not wait"


@pytest.mark.parametrize(("spoken", "code"), FAULTS.values(), ids=FAULTS)
async def test_a_fault_ends_the_connection_with_its_reason(spoken, code, caplog):
    server = Server()
    streams = [server.open(number, ended=False) for number in (1, 3)]
    for stream in streams:
        stream.reads = False
    server.heard()
    server.say(spoken)
    await turns(3)
    last, given = goaway(server)
    assert given is code
    assert last >= 3
    assert server.transport.ended
    assert [stream.losses for stream in streams] == [1, 1]
    server.say(frames.ping(b"12345678"))
    assert not server.heard(), "nothing is read any more"
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


STREAM_FAULTS = {
    "an update by nothing": (frames.window_update(1, 0), ErrorCode.PROTOCOL_ERROR),
    "an update to more than there can be": (frames.window_update(1, 2**31 - 1), ErrorCode.FLOW_CONTROL_ERROR),
    "headers twice": (frame(frames.HEADERS, frames.END_HEADERS, 1, b"\x88"), ErrorCode.PROTOCOL_ERROR),
    "data behind the end": (data(1, b"", frames.END_STREAM) + data(1, b"x"), ErrorCode.STREAM_CLOSED),
    "headers behind the end": (
        data(1, b"", frames.END_STREAM) + frame(frames.HEADERS, ENDED, 1, b"\x88"),
        ErrorCode.STREAM_CLOSED,
    ),
}


@pytest.mark.parametrize(("spoken", "code"), STREAM_FAULTS.values(), ids=STREAM_FAULTS)
async def test_a_fault_of_one_stream_is_that_streams(spoken, code):
    server = Server()
    wrong, right = server.open(1, ended=False), server.open(3, ended=False)
    server.say(spoken)
    assert resets(server) == {1: code}
    assert (wrong.losses, right.losses) == (1, 0)
    server.say(data(3, b"hello", frames.END_STREAM))
    assert right.body == b"hello"


@pytest.mark.parametrize("first", [frames.ping(b"12345678"), frames.SETTINGS_ACK])
async def test_the_first_frame_must_be_settings(first):
    server = Server(silent=True)
    server.say(frames.PREFACE + first)
    assert goaway(server) == (0, ErrorCode.PROTOCOL_ERROR)


async def test_what_the_server_does_wrong_is_logged_and_ends_the_connection(caplog):
    def fail(_: object) -> None:
        raise RuntimeError("broken")

    server = Server(on_end=fail)
    other = server.open(1, ended=False)
    server.open(3)
    assert goaway(server) == (3, ErrorCode.INTERNAL_ERROR)
    assert other.losses == 1
    assert "broken" in caplog.text


async def test_only_so_many_streams_at_once(monkeypatch):
    monkeypatch.setattr(client_frames, "MAX_STREAMS", 3)
    server = Server()
    for number in (1, 3, 5):
        server.open(number)
    server.say(server.headers(7))
    assert resets(server) == {7: ErrorCode.REFUSED_STREAM}
    server.say(frames.rst_stream(1, ErrorCode.CANCEL))
    assert server.open(9)


async def test_a_change_of_all_windows_is_dearer_with_many_streams():
    change = frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\1") + frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0")
    for count, ends in ((1, False), (4000, True)):
        server = Server()
        for number in range(1, 2 * count, 2):
            stream = server.open(number)
            stream.carrier.respond(stream, HEAD, (bytes(100_000),), 100_000, END)
        server.heard()
        server.say(change * 100)
        assert (goaway(server) == (2 * count - 1, ErrorCode.ENHANCE_YOUR_CALM)) is ends


# -- beginnings and ends ----------------------------------------------------------------------------------


async def test_nothing_is_said_before_the_client_is_seen_to_speak_http2():
    server = Server(silent=True)
    assert not server.transport.written
    server.say(HELLO[:30])
    assert not server.transport.written
    server.say(HELLO[30:])
    settings, update, ack = server.heard()
    assert (settings.kind, update.kind, ack.kind, ack.flags) == (
        frames.SETTINGS,
        frames.WINDOW_UPDATE,
        frames.SETTINGS,
        frames.ACK,
    )


@pytest.mark.parametrize(
    ("spoken", "status"),
    [(b"GET / HTTP/1.1\r\n\r\n", b"505"), (b"POST / HTTP/1.0\r\n", b"505"), (b"\x16\x03\x01\x02", b""), (b"\0", b"")],
)
async def test_who_speaks_something_else_is_told_so_if_that_is_possible(spoken, status):
    server = Server(silent=True)
    server.say(spoken)
    assert server.transport.ended
    answer = bytes(server.transport.written)
    assert answer.split(b" ")[1:2] == ([status] if status else [])
    server.say(b"more")
    assert bytes(server.transport.written) == answer


async def test_who_says_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr(module, "PREFACE_TIMEOUT_S", 0)
    server = Server(silent=True)
    server.say(HELLO[:10])
    await turns()
    assert server.transport.aborted
    server = Server()
    await turns()
    assert not server.transport.aborted


async def test_who_does_not_close_behind_the_server_is_let_go(monkeypatch):
    monkeypatch.setattr(module, "LINGER_TIMEOUT_S", 0)
    server = Server()
    server.say(data(0, b"x"))
    assert not server.transport.aborted
    await turns()
    assert server.transport.aborted


async def test_a_lost_connection_is_the_end_of_all_that_was_on_it():
    server = Server()
    streams = [server.open(number, ended=number == 1) for number in (1, 3, 5)]
    server.connection.leave()
    server.connection.connection_lost(None)
    assert [stream.losses for stream in streams] == [1, 1, 1]
    assert not server.crowd
    server.heard()
    server.say(frames.ping(b"12345678"))
    server.connection.leave()
    server.connection.give_up()
    await turns()
    assert not server.heard()
    assert not server.transport.ended


async def test_a_stop_takes_what_was_sent_before_the_client_knew():
    server = Server(on_end=echo)
    first = server.open(1, ended=False)
    server.connection.leave()
    away, ping = server.heard()
    assert (away.kind, away.payload[:8]) == (frames.GOAWAY, b"\x7f\xff\xff\xff\0\0\0\0")
    second = server.open(3, ended=False)
    server.say(frames.ping(ping.payload, frames.ACK))
    assert goaway(server) == (3, ErrorCode.NO_ERROR)
    server.say(server.headers(5))
    assert resets(server) == {5: ErrorCode.REFUSED_STREAM}
    server.say(data(1, b"hello", frames.END_STREAM))
    assert not server.transport.ended
    server.say(data(3, b"world", frames.END_STREAM))
    assert first.over
    assert second.over
    assert b"".join(one.payload for one in server.heard(frames.DATA)) == b"helloworld"
    assert server.transport.ended, "behind the last response"
    assert server.transport.reading, "so that nothing unread resets it"


@pytest.mark.parametrize(
    "last",
    [
        frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\7"),
        frames.window_update(1, 5),
        frames.rst_stream(1, ErrorCode.CANCEL),
        frames.window_update(1, 0),
        frame(frames.HEADERS, ENDED, 1, b"\x88"),
        data(1, b"x"),
    ],
)
async def test_whatever_lets_the_last_stream_end_is_the_last_thing(last, caplog):
    """Nothing is written behind the end of the connection."""
    server = Server()
    server.say(frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0"))
    stream = server.open(1)
    stream.carrier.respond(stream, HEAD, (b"12345",), 5, END)
    server.connection.leave()
    server.say(frames.ping(b"stopping", frames.ACK))
    server.say(last + frames.ping(b"12345678"))
    assert server.transport.ended
    assert not server.connection._streams
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


async def test_a_stop_does_not_wait_long_for_the_answer_to_a_ping(monkeypatch):
    monkeypatch.setattr(module, "GOAWAY_TIMEOUT_S", 0)
    server = Server()
    server.connection.leave()
    server.connection.leave()
    await turns()
    assert [one.kind for one in server.heard()] == [frames.GOAWAY, frames.PING, frames.GOAWAY]
    assert server.transport.ended


async def test_an_idle_connection_is_closed_when_its_client_has_answered():
    server = Server()
    server.connection.leave()
    server.heard()
    server.say(frames.ping(b"stopping", frames.ACK))
    assert goaway(server) == (0, ErrorCode.NO_ERROR)
    assert server.transport.ended


async def test_a_client_that_has_not_spoken_yet_is_let_go_at_a_stop():
    server = Server(silent=True)
    server.connection.leave()
    assert server.transport.ended


async def test_what_is_left_when_time_is_over_is_told_so():
    server = Server()
    streams = [server.open(number) for number in (1, 3)]
    server.connection.leave()
    server.say(frames.ping(b"stopping", frames.ACK))
    server.connection.give_up()
    assert all(stream.stopped for stream in streams)
    assert [one.stream for one in server.heard(frames.HEADERS)] == [1, 3]
    assert server.transport.ended


async def test_all_streams_are_asked_about_their_time():
    server = Server()
    seen = []

    class Timed(FakeStream):
        def check_time(self, now_ns: int) -> None:
            seen.append((self.id, now_ns))
            self.abort(ErrorCode.CANCEL)

    server.connection._accept = lambda *given: Timed(*given[:3], lambda stream: None)
    server.say(server.headers(1), server.headers(3))
    server.connection.check_time(5)
    assert seen == [(1, 5), (3, 5)]
    assert resets(server) == {1: ErrorCode.CANCEL, 3: ErrorCode.CANCEL}


async def test_a_response_that_nobody_takes_is_not_kept_for_ever():
    server = Server()
    server.say(frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0"))
    stream, begun = server.open(1), server.open(3)
    stream.carrier.respond(stream, HEAD, (b"12345",), 5, END)
    begun.headers(HEAD)
    begun.send(b"12345")
    now_ns = 10**15
    for change in (b"", frames.window_update(1, 1), frames.window_update(1, 1)):
        server.say(change)
        server.connection.check_time(now_ns)
        now_ns += module.STUCK_TIMEOUT_NS
        server.connection.check_time(now_ns)
        assert not stream.over, "it moves, if slowly"
    server.heard()
    server.connection.check_time(now_ns + 1)
    assert resets(server) == {1: ErrorCode.CANCEL}
    assert stream.losses == 1
    assert not begun.over, "one that is still being answered holds its model up, and no more"
    assert server.connection._unsent_bytes == 5
