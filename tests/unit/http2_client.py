"""A connection without a socket: an in-memory transport, frames by hand, and h2 as an independent client."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import h2.config
import h2.connection
import h2.events
import h2.settings
from hpack import Encoder

from headrace.http2 import frames
from headrace.http2.connection import Connection
from headrace.http2.stream import Stream

REQUEST = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "test"),
    (":path", "/service/Method"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]
HELLO = frames.PREFACE + frames.settings(())


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes


class Transport:
    """What a connection writes to. ``holds`` says how much of that the socket does not take yet."""

    def __init__(self) -> None:
        self.protocol: Connection | None = None
        self.written = bytearray()
        self.reading = True
        self.ended = False
        self.aborted = False
        self.holding = False  # nothing leaves
        self.held = 0
        self.high = 0
        self.full = False

    def get_extra_info(self, name: str) -> None:
        return None

    def set_write_buffer_limits(self, high: int) -> None:
        self.high = high

    def get_write_buffer_size(self) -> int:
        return self.held

    def write(self, data: bytes) -> None:
        assert not self.ended, "nothing is written behind the end"
        self.written += data
        if self.holding:
            self.held += len(data)
            if self.held > self.high and not self.full:
                self.full = True
                self.protocol.pause_writing()

    def writelines(self, pieces) -> None:
        self.write(b"".join(pieces))

    def release(self) -> None:
        """The socket takes everything."""
        self.held = 0
        if self.full:
            self.full = False
            self.protocol.resume_writing()

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def write_eof(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.aborted = True

    def frames(self) -> list[Frame]:
        """The frames that were written since the last look."""
        found = []
        data = bytes(self.written)
        self.written.clear()
        position = 0
        while position < len(data):
            high, low, kind, flags, stream = frames.read_header(data, position)
            end = position + 9 + (high << 16 | low)
            assert end <= len(data), "whole frames are written"
            found.append(Frame(kind, flags, stream, data[position + 9 : end]))
            position = end
        return found


class FakeStream(Stream):
    """Keeps what comes; ``on_end`` is called when the request is whole."""

    __slots__ = ("body", "head", "losses", "on_end", "pieces", "reads", "stopped")

    def __init__(self, connection: Connection, number: int, head: object, on_end: Callable) -> None:
        super().__init__(connection, number, *connection.new_stream_windows())
        self.head = head
        self.pieces = 0
        self.body = b""
        self.losses = 0
        self.stopped = False
        self.reads = True
        self.on_end = on_end

    def receive(self, data: bytes, *, ended: bool) -> None:
        self.pieces += 1
        self.body += data
        if self.reads and data:
            self.allow(len(data))
        if ended:
            self.on_end(self)

    def lost(self) -> None:
        self.losses += 1

    def stop(self) -> None:
        self.stopped = True
        self.end(b"\x88")


class Server:
    """One connection with all that belongs to it. The client's preface is sent unless ``silent``."""

    def __init__(
        self,
        *,
        silent: bool = False,
        on_end: Callable = lambda stream: None,
        accept: Callable | None = None,
        parse: Callable = tuple,
    ) -> None:
        self.streams: dict[int, FakeStream] = {}
        self.crowd: set[Connection] = set()
        self.on_end = on_end
        self.transport = Transport()
        self.connection = Connection(accept or self._accept, parse, self.crowd)
        self.transport.protocol = self.connection
        self.connection.connection_made(self.transport)
        self._encoder = Encoder()
        if not silent:
            self.say(HELLO)
            self.transport.frames()

    def _accept(self, connection: Connection, number: int, head: object, ended: bool) -> FakeStream:
        stream = self.streams[number] = FakeStream(connection, number, head, self.on_end)
        return stream

    def say(self, *data: bytes) -> None:
        self.connection.data_received(b"".join(data))

    def heard(self, kind: int | None = None) -> list[Frame]:
        """The frames that the server has sent since the last look, of one kind or all."""
        return [one for one in self.transport.frames() if kind in (None, one.kind)]

    def headers(self, number: int, flags: int = frames.END_HEADERS, extra: tuple = ()) -> bytes:
        block = self._encoder.encode([*REQUEST, *extra])
        return frame(frames.HEADERS, flags, number, block)

    def open(self, number: int, *, ended: bool = True) -> FakeStream:
        """Send a request, its headers only, or its headers and nothing else."""
        self.say(self.headers(number, frames.END_HEADERS | (frames.END_STREAM if ended else 0)))
        return self.streams[number]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return frames.header(len(payload), kind, flags, stream) + payload


class H2Client:
    """h2 on the other end of the wire."""

    def __init__(self, server: Server, **settings: int) -> None:
        self.server = server
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        if settings:
            self.h2.update_settings({h2.settings.SettingCodes[name]: value for name, value in settings.items()})
        self.events: list[h2.events.Event] = []
        self.exchange()

    def exchange(self) -> None:
        """Carry everything that either end has to say to the other."""
        while True:
            there = self.h2.data_to_send()
            if there:
                self.server.say(there)
            back = bytes(self.server.transport.written)
            self.server.transport.written.clear()
            if back:
                self.events += self.h2.receive_data(back)
            if not there and not back:
                return

    def request(self, body: bytes) -> int:
        """Send a request; the number of its stream."""
        number = self.h2.get_next_available_stream_id()
        self.h2.send_headers(number, REQUEST)
        self.exchange()
        while body:
            size = min(len(body), self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
            if not size:
                self.exchange()
                assert self.h2.local_flow_control_window(number), "there must be room at some time"
                continue
            self.h2.send_data(number, body[:size])
            body = body[size:]
        self.h2.end_stream(number)
        self.exchange()
        return number

    def body(self, number: int, *, acknowledge: bool = True) -> bytes:
        """What has come on a stream, all of which is then room again."""
        found = b""
        while True:
            data = [one for one in self.events if isinstance(one, h2.events.DataReceived) and one.stream_id == number]
            if not data:
                return found
            for one in data:
                self.events.remove(one)
                found += one.data
                if acknowledge:
                    self.h2.acknowledge_received_data(one.flow_controlled_length, number)
            self.exchange()

    def ended(self, number: int) -> bool:
        return any(isinstance(one, h2.events.StreamEnded) and one.stream_id == number for one in self.events)


async def turns(count: int = 3) -> None:
    """Let the loop run what is ready."""
    for _ in range(count):
        await asyncio.sleep(0)
