"""HTTP/2 as no library speaks it, over bare sockets: each ends clearly, and others are served meanwhile."""

import contextlib
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import echo_repository
import grpc
import psutil
import pytest
from fronts import TIMEOUT_S, UNLIMITED, rpc
from hpack import Decoder, Encoder
from running_server import RunningServer
from unit.http2_client import HELLO, Frame, frame

from headrace.frontends.grpc_message import prefixed
from headrace.http2 import frames
from headrace.http2.connection import GOAWAY_TIMEOUT_S
from headrace.http2.frames import ErrorCode
from headrace.http2.headers import header_block
from headrace.wire import pb

MAX_GRPC_BYTES = 20_000_000
MAX_GROWTH_BYTES = 96 << 20
PATIENCE_S = 60
ENDED = frames.END_HEADERS | frames.END_STREAM


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory):
    """A server with a bound on messages."""
    repository = echo_repository.write_small(tmp_path_factory.mktemp("http2"))
    with RunningServer(repository, "--model-control", "none", "--max-grpc-bytes", str(MAX_GRPC_BYTES)) as running:
        yield running


@pytest.fixture(scope="module")
def bystander(target: RunningServer):
    """A client that does nothing wrong and keeps its connection all the time."""
    with grpc.insecure_channel(target.grpc, options=UNLIMITED) as channel:
        infer = rpc(channel, "ModelInfer")
        infer(_message(1000), timeout=TIMEOUT_S)
        yield infer


@pytest.fixture(autouse=True)
def unharmed(target: RunningServer, bystander):
    """After each test: the bystander is served, nothing was kept, nothing was logged that should not be."""
    front = psutil.Process(target.process.pid)
    memory, connections, logged = front.memory_info().rss, len(front.net_connections("tcp")), len(target.output)
    yield
    assert bystander(_message(1000), timeout=TIMEOUT_S).id == "7"
    # Workers' memory is shared by descriptor: there is more of it once more was under way at a time.
    target.wait_for(lambda: len(front.net_connections("tcp")) <= connections, PATIENCE_S)
    assert front.memory_info().rss - memory < MAX_GROWTH_BYTES
    log = target.output[logged:]
    for word in ("Traceback", "never retrieved", "was destroyed", "never awaited", "exception handler"):
        assert word not in log, log[:3000]


def _message(size: int = 4, **parameters: int):
    """Something that is echoed; with parameters for the model that is told how to fail."""
    if not parameters:
        message = pb.ModelInferRequest(model_name="any", id="7", raw_input_contents=[bytes(size)])
        message.inputs.add(name="x_UINT8", datatype="UINT8", shape=[size])
        message.outputs.add(name="y_UINT8")
        return message
    message = pb.ModelInferRequest(model_name="fake", id="7", raw_input_contents=[bytes(4)])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    for name, value in parameters.items():
        message.parameters[name].int64_param = value
    return message


class Wire:
    """A client of frames."""

    def __init__(self, target: RunningServer, hello: bytes = HELLO) -> None:
        host, _, port = target.grpc.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self._encoder, self._decoder = Encoder(), Decoder()
        self.send(hello)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *data: bytes) -> None:
        """Send what the server still takes."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(b"".join(data))

    def headers(self, number: int, flags: int = frames.END_HEADERS, method: str = "ModelInfer", **extra: str) -> bytes:
        names = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/{pb.SERVICE}/{method}",
            "te": "trailers",
            "content-type": "application/grpc",
            **{name.replace("_", "-"): value for name, value in extra.items()},
        }
        return frame(frames.HEADERS, flags, number, self._encoder.encode(names.items()))

    def request(self, number: int, message, **extra: str) -> bytes:
        body = prefixed(message.SerializeToString())
        return self.headers(number, **extra) + frame(frames.DATA, frames.END_STREAM, number, body)

    def frame(self) -> Frame | None:
        """The next frame; None at the end of the connection."""
        while True:
            if len(self._rest) >= 9:
                high, low, kind, flags, stream = frames.read_header(self._rest, 0)
                end = 9 + (high << 16 | low)
                if len(self._rest) >= end:
                    payload, self._rest = self._rest[9:end], self._rest[end:]
                    return Frame(kind, flags, stream, payload)
            try:
                piece = self.socket.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not piece:
                return None
            self._rest += piece

    def end(self, number: int) -> tuple[str, int, bytes]:
        """How a stream ends, or the connection: its kind, its code, and the body that came before."""
        body = b""
        while (one := self.frame()) is not None:
            if one.kind == frames.GOAWAY:
                return "goaway", int.from_bytes(one.payload[4:8], "big"), body
            fields = dict(self._decoder.decode(one.payload)) if one.kind == frames.HEADERS else {}
            if one.stream != number:
                continue
            if one.kind == frames.RST_STREAM:
                return "reset", int.from_bytes(one.payload, "big"), body
            if one.kind == frames.DATA:
                body += one.payload
            elif one.kind == frames.HEADERS and one.flags & frames.END_STREAM:
                if "grpc-status" in fields:
                    return "status", int(fields["grpc-status"]), body
                return "http", int(fields[":status"]), body
        return "closed", 0, body

    def at_end(self) -> bool:
        """Whether nothing but the end of the connection comes."""
        while (one := self.frame()) is not None:
            assert one.kind != frames.DATA
        return True


GOOD = prefixed(_message().SerializeToString())

# What is sent on stream 1 behind its headers, and how that ends.
STREAMS = {
    "no message": (frame(frames.DATA, 1, 1), ("status", 12)),
    "half a prefix": (frame(frames.DATA, 1, 1, b"\0\0"), ("status", 3)),
    "half a message": (frame(frames.DATA, 1, 1, GOOD[:-1]), ("status", 3)),
    "two messages": (frame(frames.DATA, 1, 1, GOOD + GOOD), ("status", 12)),
    "a message too large": (frame(frames.DATA, 0, 1, b"\0\xff\xff\xff\xff"), ("status", 8)),
    "a flag that is none": (frame(frames.DATA, 0, 1, b"\7\0\0\0\0"), ("status", 3)),
    "packed without saying how": (frame(frames.DATA, 1, 1, b"\1" + GOOD[1:]), ("status", 3)),
    "an empty end": (frame(frames.DATA, 0, 1, GOOD) + frame(frames.DATA, 1, 1), ("status", 0)),
    "trailers for an end": (
        frame(frames.DATA, 0, 1, GOOD) + frame(frames.HEADERS, ENDED, 1, b"\0\1a\1b"),
        ("status", 0),
    ),
    "a byte a frame": (
        b"".join(frame(frames.DATA, 0, 1, bytes((byte,))) for byte in GOOD) + frame(frames.DATA, 1, 1),
        ("status", 0),
    ),
    "padding": (frame(frames.DATA, 9, 1, b"\xff" + GOOD + bytes(255)), ("status", 0)),
    "unknown frames between": (frame(0x55, 3, 1, b"x") + frame(frames.DATA, 1, 1, GOOD), ("status", 0)),
    "a window without growth": (frames.window_update(1, 0), ("reset", ErrorCode.PROTOCOL_ERROR)),
    "a window too large": (frames.window_update(1, 2**31 - 1), ("reset", ErrorCode.FLOW_CONTROL_ERROR)),
    "headers twice": (frame(frames.HEADERS, 4, 1, b"\0\1a\1b"), ("reset", ErrorCode.PROTOCOL_ERROR)),
    "data on no stream": (frame(frames.DATA, 0, 0, b"x"), ("goaway", ErrorCode.PROTOCOL_ERROR)),
    "data on a stream to come": (frame(frames.DATA, 0, 5, b"x"), ("goaway", ErrorCode.PROTOCOL_ERROR)),
    "an even stream": (frame(frames.HEADERS, ENDED, 2, b"\0\1a\1b"), ("goaway", ErrorCode.PROTOCOL_ERROR)),
    "a push": (frame(frames.PUSH_PROMISE, 4, 1, bytes(9)), ("goaway", ErrorCode.PROTOCOL_ERROR)),
    "a continuation of nothing": (frame(frames.CONTINUATION, 4, 1, b"x"), ("goaway", ErrorCode.PROTOCOL_ERROR)),
    "broken headers": (frame(frames.HEADERS, ENDED, 3, b"\xff\xff"), ("goaway", ErrorCode.COMPRESSION_ERROR)),
    "a frame too large": (b"\xff\xff\xff\0\0\0\0\0\1", ("goaway", ErrorCode.FRAME_SIZE_ERROR)),
    "a ping too short": (frame(frames.PING, 0, 0, b"x"), ("goaway", ErrorCode.FRAME_SIZE_ERROR)),
    "settings too short": (frame(frames.SETTINGS, 0, 0, b"x"), ("goaway", ErrorCode.FRAME_SIZE_ERROR)),
    "a window of two gigabytes": (
        frame(frames.SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff"),
        ("goaway", ErrorCode.FLOW_CONTROL_ERROR),
    ),
    "continuations without end": (
        frame(frames.HEADERS, 0, 3, b"\0\1a\1b") + frame(frames.CONTINUATION, 0, 3) * 100_000,
        ("goaway", ErrorCode.ENHANCE_YOUR_CALM),
    ),
    "empty data without end": (frame(frames.DATA, 0, 1) * 100_000, ("goaway", ErrorCode.ENHANCE_YOUR_CALM)),
    "priorities without end": (
        frame(frames.PRIORITY, 0, 1, bytes(5)) * 100_000,
        ("goaway", ErrorCode.ENHANCE_YOUR_CALM),
    ),
    "settings without end": (
        frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\1" * 100) * 5000,
        ("goaway", ErrorCode.ENHANCE_YOUR_CALM),
    ),
}


@pytest.mark.parametrize(("spoken", "end"), STREAMS.values(), ids=STREAMS)
def test_what_clients_may_say_and_what_not(target: RunningServer, spoken: bytes, end: tuple[str, int]):
    with Wire(target) as wire:
        wire.send(wire.headers(1), spoken)
        kind, code, body = wire.end(1)
        assert (kind, code) == end
        if end == ("status", 0):
            assert pb.ModelInferResponse.FromString(body[5:]).id == "7"
        if kind == "goaway":
            assert wire.at_end()
        else:
            wire.send(wire.request(3, _message()))
            assert wire.end(3)[:2] == ("status", 0)


HEADS = {
    "no such method": ({"method": "Nothing"}, ("status", 12)),
    "no gRPC": ({"content_type": "text/plain"}, ("http", 415)),
    "gRPC for browsers": ({"content_type": "application/grpc-web+proto"}, ("http", 415)),
    "another method of HTTP": ({":method": "GET"}, ("http", 405)),
    "a header of HTTP/1": ({"transfer_encoding": "chunked"}, ("http", 400)),
    "an unknown encoding": ({"grpc_encoding": "snappy"}, ("status", 12)),
    "a timeout that is none": ({"grpc_timeout": "5 minutes"}, ("status", 3)),
    "no time at all": ({"grpc_timeout": "0m"}, ("status", 4)),
    "all the time in the world": ({"grpc_timeout": "99999999H"}, ("status", 0)),
    "protobuf": ({"content_type": "application/grpc+proto"}, ("status", 0)),
    "other trailers": ({"te": "trailers, deflate"}, ("http", 400)),
    "binary values": ({"a_bin": "AAEC,AAE,AA==", "b_bin": ""}, ("status", 0)),
    "binary values that are none": ({"a_bin": "?"}, ("status", 3)),
}


@pytest.mark.parametrize(("extra", "end"), HEADS.values(), ids=HEADS)
def test_heads(target: RunningServer, extra: dict[str, str], end: tuple[str, int]):
    with Wire(target) as wire:
        wire.send(wire.request(1, _message(), **extra))
        assert wire.end(1)[:2] == end
        wire.send(wire.request(3, _message()))
        assert wire.end(3)[:2] == ("status", 0)


BEGINNINGS = {
    "HTTP/1.1": (b"GET / HTTP/1.1\r\nHost: t\r\n\r\n", b"HTTP/1.1 505 "),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b""),
    "zeros": (bytes(100), b""),
    "no settings": (frames.PREFACE + frames.ping(b"12345678"), None),
}


@pytest.mark.parametrize(("spoken", "answer"), BEGINNINGS.values(), ids=BEGINNINGS)
def test_connections_that_begin_as_something_else(target: RunningServer, spoken: bytes, answer: bytes | None):
    with Wire(target, spoken) as wire:
        if answer is None:
            assert wire.end(0)[:2] == ("goaway", ErrorCode.PROTOCOL_ERROR)
            return
        found = b""
        while piece := wire.socket.recv(1 << 16):
            found += piece
        assert found[: len(answer)] == answer
        assert bool(found) == bool(answer)


@contextlib.contextmanager
def _flood(target: RunningServer, begin: bytes, again: Callable[[int], bytes], *, read: bool):
    """A client that sends the same for ever, as fast as the server takes it, and reads the answers or not."""
    over = threading.Event()
    with Wire(target) as wire:
        wire.send(begin)

        def send() -> None:
            with contextlib.suppress(OSError):
                for turn in itertools.count():
                    if over.is_set():
                        return
                    wire.socket.sendall(again(turn))

        def receive() -> None:
            with contextlib.suppress(OSError):
                while read and not over.is_set() and wire.socket.recv(1 << 16):
                    pass

        threads = [threading.Thread(target=one) for one in (send, receive)]
        for one in threads:
            one.start()
        try:
            yield wire
        finally:
            over.set()
            with contextlib.suppress(OSError):
                wire.socket.shutdown(socket.SHUT_RDWR)
            for one in threads:
                one.join()


def _resets(count: int) -> bytes:
    """Requests that are taken back at once."""
    pairs = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", f"/{pb.SERVICE}/ModelInfer".encode()),
        (b"content-type", b"application/grpc"),
    ]
    block = header_block(pairs)
    return b"".join(
        frame(frames.HEADERS, 4, number, block)
        + frame(frames.DATA, 1, number, GOOD)
        + frames.rst_stream(number, ErrorCode.CANCEL)
        for number in range(1, 2 * count, 2)
    )


def _calls_of_nothing(turn: int) -> bytes:
    """A hundred requests, each of which is answered with a status at once."""
    block = header_block([(b":method", b"POST"), (b":path", b"/no/thing"), (b"content-type", b"application/grpc")])
    first = 200 * turn + 1
    return b"".join(frame(frames.HEADERS, ENDED, number, block) for number in range(first, first + 200, 2))


FLOODS = {
    "pings": (b"", lambda _: frames.ping(b"12345678") * 100),
    "calls of nothing": (b"", _calls_of_nothing),
    "small windows": (frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0"), lambda _: frames.window_update(0, 1) * 100),
}


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize(("begin", "again"), FLOODS.values(), ids=FLOODS)
def test_a_flood_leaves_room_for_others(target: RunningServer, bystander, begin: bytes, again: Callable, read: bool):
    with _flood(target, begin, again, read=read):
        for _ in range(5):  # a machine that stands still for a while is no flood's fault
            slowest = 0.0
            until = time.monotonic() + 1
            while time.monotonic() < until:
                started = time.monotonic()
                assert bystander(_message(1000), timeout=TIMEOUT_S).id == "7"
                slowest = max(slowest, time.monotonic() - started)
            if slowest < 1:
                break
    assert slowest < 1


def test_requests_that_are_taken_back_at_once(target: RunningServer, bystander):
    with Wire(target) as wire:
        wire.send(_resets(5000))
        for _ in range(5):
            assert bystander(_message(1000), timeout=TIMEOUT_S).id == "7"
        wire.send(wire.request(10_001, _message()))
        kind, code, _ = wire.end(10_001)
        assert (kind, code) in {("status", 0), ("status", 14)}, "answered, or the queue was full of the dead"


def test_many_streams_whose_windows_stay_shut(target: RunningServer, bystander):
    """And a client that opens and shuts them all, over and over, until it is told to stop."""
    with Wire(target) as wire:
        wire.send(frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0"))
        for number in range(1, 1001, 2):
            wire.send(wire.request(number, _message(100)))
        started = time.monotonic()
        wire.send(
            (frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\1") + frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\0")) * 10_000
        )
        assert bystander(_message(1000), timeout=TIMEOUT_S).id == "7"
        assert wire.end(0)[:2] == ("goaway", ErrorCode.ENHANCE_YOUR_CALM)
        assert time.monotonic() - started < 20


def test_a_window_of_one_byte(target: RunningServer):
    with Wire(target) as wire:
        wire.send(frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\1"), wire.request(1, _message(100)))
        wire.send(frames.window_update(1, 1) * 300)
        kind, code, body = wire.end(1)
        assert (kind, code) == ("status", 0)
        assert pb.ModelInferResponse.FromString(body[5:]).raw_output_contents == [bytes(100)]


@pytest.mark.parametrize("where", ["in the request", "before the response", "in the response"])
def test_clients_that_die_leave_nothing_behind(target: RunningServer, where: str):
    """Reset, as by a kill, and half closed, as by a crash of what the client ran in."""
    for how in ("reset", "close"):
        for _ in range(10):
            with Wire(target) as wire:
                if where == "in the request":
                    wire.send(wire.headers(1), frame(frames.DATA, 0, 1, GOOD[:-3]), wire.headers(3, 0))
                elif where == "before the response":
                    wire.send(wire.request(1, _message(fake_delay_ms=30)))
                else:
                    wire.send(
                        frame(frames.SETTINGS, 0, 0, b"\0\4\x7f\xff\xff\xff"),
                        frames.window_update(0, 2**30),
                        wire.headers(1),
                    )
                    body = prefixed(_message(3_000_000).SerializeToString())
                    for start in range(0, len(body), 1 << 20):
                        last = start + (1 << 20) >= len(body)
                        wire.send(frame(frames.DATA, int(last), 1, body[start : start + (1 << 20)]))
                    while (one := wire.frame()) is not None and one.kind != frames.DATA:
                        pass
                if how == "reset":
                    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_client_that_reads_nothing_holds_nobody_up(target: RunningServer, bystander):
    with Wire(target) as wire:
        wire.send(frame(frames.SETTINGS, 0, 0, b"\0\4\x7f\xff\xff\xff"), frames.window_update(0, 2**30))
        message = _message(1_000_000)
        for number in range(1, 21, 2):
            wire.send(wire.headers(number))
            body = prefixed(message.SerializeToString())
            wire.send(frame(frames.DATA, 1, number, body))
        for _ in range(20):
            assert bystander(_message(1000), timeout=TIMEOUT_S).id == "7"
        for number in range(1, 21, 2):
            wire.send(frames.rst_stream(number, ErrorCode.CANCEL))


def test_a_deadline_ends_a_call_whose_request_never_comes(target: RunningServer):
    with Wire(target) as wire:
        started = time.monotonic()
        wire.send(wire.headers(1, grpc_timeout="50m"))
        assert wire.end(1)[:2] == ("status", 4)
        wire.send(wire.headers(3, grpc_timeout="50m"), frame(frames.DATA, 0, 3, GOOD[:9]))
        assert wire.end(3)[:2] == ("status", 4)
        assert time.monotonic() - started < 20


@pytest.mark.parametrize("answers_ping", [True, False])
def test_a_stop_loses_no_answer(tmp_path_factory: pytest.TempPathFactory, answers_ping: bool):
    """One request is under way, one is sent after the first GOAWAY, and the client's windows grow all the time."""
    repository = echo_repository.write_small(tmp_path_factory.mktemp("stop"))
    for _ in range(3):
        seconds, ended, received = _stop(repository, answers_ping)
        if ended == ({1, 3}, 3) or seconds < GOAWAY_TIMEOUT_S:  # else it may have been too late to send it
            break
    assert ended == ({1, 3}, 3)
    assert received > 3_000_000


def _stop(repository: Path, answers_ping: bool) -> tuple[float, tuple[set[int], int | None], int]:
    """Seconds until the second request was sent; which ones were answered, the last one of the GOAWAY; its bytes."""
    with RunningServer(repository, "--model-control", "none") as server, Wire(server) as wire, Wire(server) as idle:
        wire.send(
            frame(frames.SETTINGS, 0, 0, b"\0\4\x7f\xff\xff\xff"),
            frames.window_update(0, 2**30),
            wire.request(1, _message(fake_delay_ms=500)),
        )
        began = time.monotonic()
        server.process.terminate()
        first = ping = None
        while ping is None:
            one = wire.frame()
            first = one if one.kind == frames.GOAWAY else first
            ping = one if one.kind == frames.PING else None
        assert first.payload[:8] == b"\x7f\xff\xff\xff\0\0\0\0"
        body = prefixed(_message(3_000_000).SerializeToString())
        wire.send(wire.headers(3))
        seconds = time.monotonic() - began
        for start in range(0, len(body), 1 << 20):
            wire.send(frame(frames.DATA, int(start + (1 << 20) >= len(body)), 3, body[start : start + (1 << 20)]))
        if answers_ping:
            wire.send(frames.ping(ping.payload, frames.ACK))
        over, received, last = set(), 0, None
        while (one := wire.frame()) is not None:
            if one.kind == frames.GOAWAY:
                last = int.from_bytes(one.payload[:4], "big")
            if one.kind == frames.DATA:
                wire.send(frames.window_update(0, max(1, len(one.payload))))
                received += len(one.payload)
            if one.kind == frames.HEADERS and one.flags & frames.END_STREAM:
                over.add(one.stream)
        assert idle.at_end()
        assert server.process.wait(TIMEOUT_S) == 0
        assert "Traceback" not in server.output
        return seconds, (over, last), received
