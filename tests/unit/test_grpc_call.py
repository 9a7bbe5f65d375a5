"""Calls from frames to frames, in memory: every kind of procedure, every end, and nothing left behind."""

import asyncio
import gc
import gzip
import weakref
from time import monotonic_ns
from types import SimpleNamespace
from urllib.parse import unquote_to_bytes

import pytest
from hpack import Decoder
from unit.http2_client import REQUEST, H2Client, Server, frame, turns

from headrace.core.errors import InternalError, InvalidRequest, NotFound, Overloaded
from headrace.core.request import InferResponse
from headrace.core.tensor import DataType, Tensor
from headrace.frontends import grpc_call, grpc_lane
from headrace.frontends.arrivals import Arrivals
from headrace.frontends.grpc_infer import GrpcInfer
from headrace.frontends.grpc_lane import InferLane
from headrace.frontends.grpc_message import prefixed
from headrace.frontends.grpc_server import GrpcServer
from headrace.frontends.grpc_stream import ERRORS_AS_STATUS, StreamService
from headrace.frontends.grpc_streaming_call import StreamingCall
from headrace.frontends.status import StatusCode
from headrace.http2 import frames
from headrace.http2.client_frames import STREAM_WINDOW
from headrace.http2.frames import ErrorCode
from headrace.wire import pb

ENDED = frames.END_HEADERS | frames.END_STREAM
MAX_BYTES = 10_000_000


class Engine:
    """Answers when a test says so."""

    def __init__(self) -> None:
        self.asked = []
        self.futures = []
        self.refusal: Exception | None = None

    def infer(self, request):
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(request)
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]

    def answer(self, index: int = -1, size: int = 4) -> None:
        tensors = (Tensor("y", DataType.UINT8, (size,), bytes(size)),)
        self.futures[index].set_result(InferResponse("m", "1", self.asked[index].id, tensors))


class Service:
    """One procedure of each kind."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.error: Exception | None = None
        self.seen = []
        self.cancelled = 0

    async def ServerLive(self, request, _):  # noqa: N802
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return pb.ServerLiveResponse(live=True)

    async def Watch(self, _, call):  # noqa: N802
        for _number in range(3):
            await call.write(pb.HealthCheckResponse(status=1))
            self.seen.append("written")

    async def ModelStreamInfer(self, requests, call):  # noqa: N802
        try:
            async for message in requests:
                self.seen.append(message)
                await self.gate.wait()
                await call.write(pb.ModelStreamInferResponse(error_message=f"{len(message)}"))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class World:
    """A server's calls on one connection."""

    def __init__(self, *, compression: str = "none", max_bytes: int = MAX_BYTES, max_arriving: int = 10**9) -> None:
        self.engine = Engine()
        self.service = Service()
        self.grpc = GrpcServer(
            {pb.SERVICE: (pb.RPCS, [self.service]), pb.HEALTH_SERVICE: (pb.HEALTH_RPCS, [self.service])},
            InferLane(self.engine, GrpcInfer(lambda *_: None)),
            None,
            max_bytes,
            Arrivals(max_arriving),
            compression=compression,
        )
        self.arrivals = self.grpc._terms.arrivals
        self.server = Server(accept=self.grpc._accept, parse=self.grpc._parse)
        self.say = self.server.say
        self._decoder = Decoder()

    def begin(
        self, number: int, method: str = "ModelInfer", *extra, flags: int = frames.END_HEADERS, **changes
    ) -> None:
        service = pb.HEALTH_SERVICE if method == "Watch" else pb.SERVICE
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/{service}/{method}",
            "te": "trailers",
            "content-type": "application/grpc",
            **{name.replace("_", "-"): value for name, value in changes.items()},
        }
        block = self.server._encoder.encode([*headers.items(), *extra])
        self.say(frame(frames.HEADERS, flags, number, block))

    def data(self, number: int, payload: bytes, *, ended: bool = False) -> None:
        self.say(frame(frames.DATA, frames.END_STREAM if ended else 0, number, payload))

    def call(self, number: int, method: str = "ModelInfer", payload: bytes | None = None, **changes) -> None:
        self.begin(number, method, **changes)
        self.data(
            number,
            prefixed(infer_message() if method == "ModelInfer" else b"") if payload is None else payload,
            ended=True,
        )

    def streams(self):
        return self.server.connection._streams

    def heard(self):
        """Everything since the last look, by stream: headers, body, and the code of a reset."""
        found: dict[int, dict] = {}
        for one in self.server.heard():
            if not one.stream:
                continue
            mine = found.setdefault(one.stream, {"headers": {}, "body": b"", "reset": None, "ended": False})
            if one.kind == frames.HEADERS:
                mine["headers"].update(self._decoder.decode(one.payload))
                mine["ended"] |= bool(one.flags & frames.END_STREAM)
            elif one.kind == frames.DATA:
                mine["body"] += one.payload
            elif one.kind == frames.RST_STREAM:
                mine["reset"] = int.from_bytes(one.payload, "big")
        return found

    def status(self, number: int = 1) -> tuple[StatusCode, str]:
        headers = self.heard()[number]["headers"]
        message = unquote_to_bytes(headers.get("grpc-message", "")).decode()
        return StatusCode(int(headers["grpc-status"])), message


def infer_message(size: int = 4, id: str = "7") -> bytes:  # noqa: A002
    message = pb.ModelInferRequest(model_name="m", id=id, raw_input_contents=[bytes(size)])
    message.inputs.add(name="x", datatype="UINT8", shape=[size])
    return message.SerializeToString()


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """No warning of the interpreter, no complaint of the loop."""
    complaints = []

    async def listen() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    yield listen
    gc.collect()
    assert not complaints


@pytest.fixture
async def world(nothing_is_left_behind):
    await nothing_is_left_behind()
    yield World()
    await turns()


# -- inference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 100_000])
async def test_an_inference_call(world, size):
    world.say(frame(frames.SETTINGS, 0, 0, b"\0\4\x7f\xff\xff\xff") + frames.window_update(0, 10**9))
    world.call(1)
    (asked,) = world.engine.asked
    assert (asked.model, asked.id, bytes(asked.inputs[0].data)) == ("m", "7", bytes(4))
    world.engine.answer(size=size)
    await turns()
    heard = world.heard()[1]
    assert heard["headers"] == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-accept-encoding": "identity,deflate,gzip",
        "grpc-status": "0",
    }
    assert heard["ended"]
    assert heard["body"][:1] == b"\0"
    assert int.from_bytes(heard["body"][1:5], "big") == len(heard["body"]) - 5
    assert pb.ModelInferResponse.FromString(heard["body"][5:]).raw_output_contents == [bytes(size)]
    assert not world.streams()


@pytest.mark.parametrize("empty_end", [True, False])
async def test_a_message_cut_at_every_place(empty_end, world):
    data = prefixed(infer_message())
    for number, cut in enumerate(range(len(data) + 1)):
        stream = 2 * number + 1
        world.begin(stream)
        world.data(stream, data[:cut])
        world.data(stream, data[cut:], ended=not empty_end)
        if empty_end:
            world.data(stream, b"", ended=True)
        assert len(world.engine.asked) == number + 1, cut
    assert world.arrivals.bytes == 0
    for index in range(len(world.engine.asked)):
        world.engine.answer(index)
    await turns()
    assert all(one["headers"]["grpc-status"] == "0" for one in world.heard().values())


async def test_a_large_request_is_let_in_and_counted_while_it_arrives():
    world = World()
    client = H2Client(Server(silent=True, accept=world.grpc._accept, parse=world.grpc._parse))
    path = [(name, f"/{pb.SERVICE}/ModelInfer" if name == ":path" else value) for name, value in REQUEST]
    number = client.h2.get_next_available_stream_id()
    client.h2.send_headers(number, path)
    body = prefixed(infer_message(3 * STREAM_WINDOW // 2))
    most = position = 0
    while position < len(body):
        size = min(client.h2.local_flow_control_window(number), client.h2.max_outbound_frame_size, len(body) - position)
        assert size
        client.h2.send_data(number, body[position : position + size])
        position += size
        client.exchange()
        most = max(most, world.arrivals.bytes)
    client.h2.end_stream(number)
    client.exchange()
    assert most == len(body) - 5, "the prefix is not kept"
    assert world.arrivals.bytes == 0
    assert len(world.engine.asked[0].inputs[0].data) == 3 * STREAM_WINDOW // 2


@pytest.mark.parametrize(
    ("payload", "status", "says"),
    [
        (b"", StatusCode.UNIMPLEMENTED, "brought none"),
        (b"\0\0\0", StatusCode.INVALID_ARGUMENT, "middle"),
        (b"\0\0\0\0\5abc", StatusCode.INVALID_ARGUMENT, "8 bytes in"),
        (prefixed(b"a") + prefixed(b"b"), StatusCode.UNIMPLEMENTED, "more of them"),
        (b"\2\0\0\0\0", StatusCode.INVALID_ARGUMENT, "begins with 2"),
        (b"\1\0\0\0\3abc", StatusCode.INVALID_ARGUMENT, "names no grpc-encoding"),
        (b"\0\x00\x98\x96\x81", StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
        (prefixed(b"\x0a\x05ab"), StatusCode.INVALID_ARGUMENT, "ModelInferRequest"),
    ],
)
@pytest.mark.parametrize("ended", [True, False])
async def test_requests_that_are_none(world, payload, status, says, ended):
    world.begin(1)
    if ended:
        world.data(1, payload, ended=True)
    else:
        world.data(1, payload)
        world.data(1, b"", ended=True)
    code, message = world.status()
    assert code is status
    assert says in message
    assert not world.streams()
    assert world.arrivals.bytes == 0
    assert not world.engine.asked


async def test_headers_that_are_the_whole_call(world):
    world.begin(1, flags=ENDED)
    assert world.status()[0] is StatusCode.UNIMPLEMENTED


async def test_packed_requests(world):
    packed = gzip.compress(infer_message())
    world.call(1, payload=b"\1" + len(packed).to_bytes(4, "big") + packed, grpc_encoding="gzip")
    assert world.engine.asked[0].id == "7"
    bomb = gzip.compress(bytes(MAX_BYTES + 1))
    world.call(3, payload=b"\1" + len(bomb).to_bytes(4, "big") + bomb, grpc_encoding="gzip")
    code, message = world.status(3)
    assert code is StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX_BYTES) in message


@pytest.mark.parametrize("accepts", ["identity,gzip", "gzip", "identity", "none", ""])
@pytest.mark.parametrize("compression", ["gzip", "none"])
async def test_responses_are_packed_for_those_who_can_read_them(accepts, compression):
    world = World(compression=compression)
    for number, size in ((1, 10), (3, 10_000)):
        world.call(number, grpc_accept_encoding=accepts)
        world.engine.answer(size=size)
        await turns()
        heard = world.heard()[number]
        packed = compression == "gzip" and "gzip" in accepts and size == 10_000
        assert heard["headers"].get("grpc-encoding") == ("gzip" if packed else None)
        assert heard["body"][0] == packed
        data = gzip.decompress(heard["body"][5:]) if packed else heard["body"][5:]
        assert len(pb.ModelInferResponse.FromString(data).raw_output_contents[0]) == size


async def test_refusals_and_failures_become_statuses(world, caplog):
    world.engine.refusal = NotFound("no such model: 100% 'ä€😀'\n")
    world.call(1)
    assert world.status() == (StatusCode.NOT_FOUND, "no such model: 100% 'ä€😀'\n")
    world.engine.refusal = RuntimeError("broken")
    world.call(3)
    assert world.status(3)[0] is StatusCode.INTERNAL
    world.engine.refusal = None
    for number, error in ((5, InvalidRequest("bad")), (7, RuntimeError("worse")), (9, InternalError("ours"))):
        world.call(number)
        world.engine.futures[-1].set_exception(error)
    await turns()
    heard = world.heard()
    assert [heard[number]["headers"]["grpc-status"] for number in (5, 7, 9)] == ["3", "13", "13"]
    assert "worse" not in heard[7]["headers"]["grpc-message"]
    assert caplog.text.count("worse") == 1


async def test_a_response_that_cannot_be_written_is_an_end_too(world, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(grpc_lane.UnaryCall, "respond", fail)
    world.call(1)
    world.engine.answer()
    await turns()
    assert world.status()[0] is StatusCode.INTERNAL
    assert "no memory" in caplog.text


async def test_a_response_larger_than_any_message(world, monkeypatch):
    monkeypatch.setattr(grpc_call, "MAX_BYTES", 100)
    world.call(1)
    world.engine.answer(size=200)
    await turns()
    assert world.status()[0] is StatusCode.RESOURCE_EXHAUSTED


async def test_a_call_that_is_taken_back_takes_its_inference_back(world):
    world.call(1)
    world.call(3)
    world.say(frames.rst_stream(1, ErrorCode.CANCEL))
    first, second = world.engine.futures
    assert (first.cancelled(), second.cancelled()) == (True, False)
    # One fails in the same turn of the loop as it is taken back: its error is nobody's, and no complaint of the loop's.
    second.set_exception(RuntimeError("too late"))
    world.say(frames.rst_stream(3, ErrorCode.CANCEL))
    await turns()
    assert not world.heard()
    world.call(5)
    world.engine.futures[-1].set_exception(InvalidRequest("too late"))
    world.say(frames.rst_stream(5, ErrorCode.CANCEL))
    del first, second
    world.engine.futures.clear()
    await turns()
    assert not world.heard()


# -- heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [frames.END_HEADERS, ENDED])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"content_type": "application/json"}, {":status": "415"}),
        ({"te": "gzip"}, {":status": "400"}),
    ],
)
async def test_what_is_no_call_has_a_status_of_http(world, changes, expected, flags):
    world.begin(1, flags=flags, **changes)
    heard = world.heard()[1]
    assert heard["headers"] == expected
    assert heard["ended"]
    assert heard["reset"] == (None if flags == ENDED else ErrorCode.NO_ERROR)


@pytest.mark.parametrize("flags", [frames.END_HEADERS, ENDED])
async def test_calls_that_are_refused_for_their_heads(world, flags):
    for number, method, changes, status in (
        (1, "NoSuchMethod", {}, StatusCode.UNIMPLEMENTED),
        (3, "ModelInfer", {"grpc_encoding": "br"}, StatusCode.UNIMPLEMENTED),
        (5, "ModelInfer", {"grpc_timeout": "soon"}, StatusCode.INVALID_ARGUMENT),
        (7, "ModelStreamInfer", {"x_bin": "?"}, StatusCode.INVALID_ARGUMENT),
    ):
        world.begin(number, method, flags=flags, **changes)
        heard = world.heard()[number]
        assert (heard["headers"][":status"], int(heard["headers"]["grpc-status"])) == ("200", status)
        assert heard["reset"] == (None if flags == ENDED else ErrorCode.NO_ERROR)
        world.data(number, b"more")
    assert not world.heard()
    assert not world.streams()


async def test_a_long_message_fits_into_the_headers_of_any_client(world):
    for number, text in ((1, "x" * 10_000), (3, "😀" * 3000), (5, "\udcff" * 3000)):
        world.engine.refusal = NotFound(text)
        world.call(number)
        message = world.heard()[number]["headers"]["grpc-message"]
        assert len(message) <= 6000
        assert set(unquote_to_bytes(message).decode()) == set(text.encode("utf-8", "replace").decode())


# -- deadlines --------------------------------------------------------------------------------------------


async def test_a_deadline_holds_while_the_request_arrives(world):
    world.begin(1, grpc_timeout="1n")
    world.data(1, prefixed(infer_message())[:20])
    await asyncio.sleep(0.001)
    await turns()
    assert world.status()[0] is StatusCode.DEADLINE_EXCEEDED
    assert world.arrivals.bytes == 0
    world.data(1, prefixed(infer_message())[20:], ended=True)
    assert not world.engine.asked


async def test_a_deadline_holds_when_nothing_arrives_at_all(world):
    world.begin(1, grpc_timeout="1H")
    world.server.connection.check_time(monotonic_ns())
    assert world.streams()
    world.server.connection.check_time(monotonic_ns() + 3601 * 10**9)
    assert world.status()[0] is StatusCode.DEADLINE_EXCEEDED
    assert not world.streams()


async def test_a_deadline_holds_while_the_response_waits_for_room(world):
    world.say(frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0"))
    world.call(1, grpc_timeout="1H")
    world.engine.answer()
    await turns()
    assert not world.heard()[1]["ended"]
    world.server.connection.check_time(monotonic_ns() + 3601 * 10**9)
    assert world.heard()[1]["reset"] == ErrorCode.CANCEL
    assert not world.streams()


async def test_a_deadline_takes_inference_back(world):
    world.call(1, grpc_timeout="1H")
    world.server.connection.check_time(monotonic_ns() + 3601 * 10**9)
    assert world.engine.futures[0].cancelled()


async def test_a_deadline_of_a_call_with_a_task(world):
    world.call(1, "ServerLive", grpc_timeout="1n")
    await asyncio.sleep(0.001)
    await turns()
    assert world.status()[0] is StatusCode.DEADLINE_EXCEEDED
    assert not world.streams()


# -- calls with tasks -------------------------------------------------------------------------------------


async def test_a_call_with_a_task(world):
    world.service.gate.set()
    world.call(1, "ServerLive")
    await turns()
    heard = world.heard()[1]
    assert pb.ServerLiveResponse.FromString(heard["body"][5:]).live
    assert heard["headers"]["grpc-status"] == "0"


@pytest.mark.parametrize(
    ("error", "status"), [(NotFound("x"), StatusCode.NOT_FOUND), (RuntimeError("x"), StatusCode.INTERNAL)]
)
async def test_a_task_that_fails(world, error, status, caplog):
    world.service.gate.set()
    world.service.error = error
    world.call(1, "ServerLive")
    await turns()
    assert world.status()[0] is status


async def test_bytes_that_are_no_message_for_a_task(world):
    world.call(1, "ServerLive", prefixed(b"\xff\xff"))
    await turns()
    assert world.status()[0] is StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("method", ["ServerLive", "ModelStreamInfer"])
@pytest.mark.parametrize("how", ["reset", "lost", "stop"])
async def test_a_task_whose_client_leaves_is_cancelled_even_before_it_has_begun(world, begun, method, how):
    world.begin(1, method)
    world.data(1, prefixed(b""), ended=method == "ServerLive")
    if begun:
        await turns()
    if how == "reset":
        world.say(frames.rst_stream(1, ErrorCode.CANCEL))
    elif how == "lost":
        world.server.connection.connection_lost(None)
    else:
        world.server.connection.give_up()
        assert world.status()[0] is StatusCode.UNAVAILABLE
    await turns()
    assert world.service.cancelled == begun
    assert not world.streams()


async def test_many_responses_wait_for_room_one_at_a_time(world):
    world.say(frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0"))
    world.call(1, "Watch")
    await turns()
    assert world.service.seen == []
    world.say(frames.window_update(1, 7))
    await turns()
    assert world.service.seen == ["written"]
    world.say(frames.window_update(1, 100))
    await turns(5)
    heard = world.heard()[1]
    assert heard["body"] == 3 * b"\0\0\0\0\2\x08\1"
    assert heard["headers"]["grpc-status"] == "0"


# -- streams ----------------------------------------------------------------------------------------------


async def test_messages_of_a_stream_in_any_cut(world):
    world.service.gate.set()
    world.begin(1, "ModelStreamInfer")
    data = b"".join(prefixed(bytes(size)) for size in (0, 3, 1000))
    for position in range(0, len(data), 7):
        world.data(1, data[position : position + 7])
        await turns(1)
    world.data(1, b"", ended=True)
    await turns(10)
    assert [len(one) for one in world.service.seen] == [0, 3, 1000]
    assert world.heard()[1]["headers"]["grpc-status"] == "0"
    assert world.arrivals.bytes == 0


@pytest.mark.parametrize(
    ("payload", "ended", "status"),
    [
        (b"\0\0\0\0\5abc", True, StatusCode.INVALID_ARGUMENT),
        (b"\2\0\0\0\0", False, StatusCode.INVALID_ARGUMENT),
        (b"\0\xff\0\0\0", False, StatusCode.RESOURCE_EXHAUSTED),
        (b"\1\0\0\0\3abc", False, StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_stream_that_brings_no_message_ends(world, payload, ended, status):
    world.service.gate.set()
    world.begin(1, "ModelStreamInfer")
    await turns()
    world.data(1, payload, ended=ended)
    await turns(5)
    assert world.status()[0] is status
    assert not world.streams()
    assert world.arrivals.bytes == 0


async def test_an_error_is_not_overwritten_by_a_later_end(world):
    """The client has no room for what came before it, so that the call is not over yet."""
    world.service.gate.set()
    world.say(frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0"))
    world.begin(1, "ModelStreamInfer")
    world.data(1, prefixed(b"abc"))
    await turns()
    world.data(1, b"\2\0\0\0\0")
    world.data(1, b"", ended=True)
    await turns(5)
    world.say(frames.window_update(1, 100))
    await turns()
    assert world.status()[0] is StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("size", [200, 100_000])
async def test_a_client_can_be_ahead_of_its_reader_by_so_much(world, size):
    world.say(frame(frames.SETTINGS, 0, 0, b"\0\4\x7f\xff\xff\xff") + frames.window_update(0, 10**9))
    world.begin(1, "ModelStreamInfer")
    await turns()
    sent = 0
    payload = prefixed(bytes(size))
    many = payload * max(1, 10_000 // len(payload))
    while world.streams()[1].receivable >= len(many):
        world.data(1, many)
        sent += len(many)
        assert sent < 100 * STREAM_WINDOW
    assert sent <= 2 * STREAM_WINDOW
    world.service.gate.set()
    await turns(sent // len(payload) + 100)
    assert world.streams()[1].receivable > STREAM_WINDOW // 2
    world.say(frames.rst_stream(1, ErrorCode.CANCEL))
    await turns()


async def test_empty_messages_count_too(world):
    world.begin(1, "ModelStreamInfer")
    world.data(1, 1000 * prefixed(b""))
    assert world.arrivals.bytes >= 64_000
    world.say(frames.rst_stream(1, ErrorCode.CANCEL))
    await turns()
    assert world.arrivals.bytes == 0


async def test_messages_of_a_stream_are_unpacked_when_they_are_read(world):
    """So that a frame of many bombs does not take the memory of all of them."""
    bomb = gzip.compress(bytes(MAX_BYTES))
    world.begin(1, "ModelStreamInfer", grpc_encoding="gzip")
    world.data(1, 20 * (b"\1" + len(bomb).to_bytes(4, "big") + bomb))
    await turns()
    assert [len(one) for one in world.service.seen] == [MAX_BYTES]
    assert world.arrivals.bytes < 2_000_000
    world.say(frames.rst_stream(1, ErrorCode.CANCEL))
    await turns()


# -- together ---------------------------------------------------------------------------------------------


async def test_requests_that_are_not_whole_are_bounded_together():
    world = World(max_arriving=1000)
    for number in (1, 3, 5):
        world.begin(number)
    world.data(1, prefixed(bytes(5000))[:2000])
    assert world.streams()[1], "one alone may be as large as any message"
    world.data(3, prefixed(bytes(5000))[:100])
    code, message = world.status(3)
    assert code is StatusCode.UNAVAILABLE
    assert "1000 (--max-inflight-bytes)" in message
    world.say(frames.rst_stream(1, ErrorCode.CANCEL))
    assert world.arrivals.bytes == 0
    world.data(5, prefixed(bytes(5000))[:100])
    assert world.streams()[5]


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
async def test_what_has_arrived_is_forgotten_with_its_call(world, method):
    for number, end in ((1, lambda: world.say(frames.rst_stream(1, 8))), (3, lambda: world.data(3, b"", ended=True))):
        world.begin(number, method)
        world.data(number, prefixed(bytes(5000))[:2000])
        assert world.arrivals.bytes
        end()
        await turns()
        assert world.arrivals.bytes == 0
    world.begin(5, method)
    world.data(5, prefixed(bytes(5000))[:2000])
    world.server.connection.connection_lost(None)
    await turns()
    assert world.arrivals.bytes == 0


async def test_a_stream_whose_client_has_left_is_held_by_nobody():
    gc.disable()
    try:
        before = streaming_calls()
        world = World()
        world.begin(1, "ModelStreamInfer")
        world.data(1, prefixed(infer_message()))
        await turns()
        assert streaming_calls() == before + 1
        world.say(frame(frames.RST_STREAM, 0, 1, ErrorCode.CANCEL.to_bytes(4, "big")))
        await turns()
        assert world.service.cancelled == 1
        assert streaming_calls() == before
    finally:
        gc.enable()


async def test_a_stream_that_an_error_ends_is_held_by_nobody():
    class Told:
        metadata = ((ERRORS_AS_STATUS, "true"),)
        failure = None

        def fail(self, error):
            self.failure = error

    def refuse(_):
        raise Overloaded("Exceeds maximum queue size")

    async def requests():
        yield infer_message()

    call = Told()
    gone = weakref.ref(call)
    gc.disable()
    try:
        service = StreamService(SimpleNamespace(stream=refuse), GrpcInfer(lambda *_: None))
        await service.ModelStreamInfer(requests(), call)
        assert isinstance(call.failure, Overloaded)
        await turns()
        del call
        assert gone() is None
    finally:
        gc.enable()


def streaming_calls() -> int:
    return sum(isinstance(one, StreamingCall) for one in gc.get_objects())
