"""One HTTP/2 connection of a gRPC client: frames, windows and headers, and no more of it than unary calls take.

Python's gRPC library costs its caller some 250 us a call, several times what a fast server spends on one, so that it is
the library that is measured. This costs some 40 us.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from struct import Struct
from typing import cast

import hpack

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 1, 1, 4, 8, 32
_HEADER_TABLE_SIZE, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 1, 4, 5
_LARGEST_WINDOW = (1 << 31) - 1
_RETURN_BYTES = 1 << 28  # of the connection's window, given back in one piece
_MAX_STREAM = (1 << 31) - 1
_SETTING = Struct(">HI")
_NUMBER = Struct(">I")
_MESSAGE = Struct(">BI")

# An answer's gRPC message, and the problem with it or None.
Answered = Callable[[bytes, str | None], None]


class _Stream:
    """One call under way: what is still to be sent, and what has come."""

    __slots__ = ("answered", "body", "headers", "payload", "sent_bytes", "window")

    def __init__(self, answered: Answered, window: int, payload: bytes) -> None:
        self.answered = answered
        self.payload = payload
        self.window = window
        self.sent_bytes = 0
        self.body = bytearray()
        self.headers: dict[str, str] = {}


class H2Connection(asyncio.Protocol):
    """Calls one method as often as it is told to, several at a time: with one message, or with one for each call."""

    def __init__(self, host: str, path: str, message: bytes) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # the server's settings are here
        self._names = [(":path", path), (":authority", host), ("te", "trailers"), ("content-type", "application/grpc")]
        self._payload = _payload(message)
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._streams: dict[int, _Stream] = {}
        self._blocked: deque[int] = deque()  # calls that wait for a window
        self._next_stream = 1
        self._encoder = hpack.Encoder()
        self._repeated: bytes | None = None
        self._decoded: dict[bytes, dict[str, str]] = {}
        self._window, self._initial_window, self._frame_bytes = 65_535, 65_535, 16_384
        self._received_bytes = 0

    @property
    def usable(self) -> bool:
        """Whether calls can be made on it."""
        open_now = self._transport is not None and not self._transport.is_closing()
        return open_now and self._next_stream < _MAX_STREAM

    def call(self, answered: Answered, message: bytes | None = None) -> None:
        """Send the message, or another one; the answer or the failure is told once."""
        stream_id, self._next_stream = self._next_stream, self._next_stream + 2
        payload = self._payload if message is None else _payload(message)
        self._streams[stream_id] = _Stream(answered, self._initial_window, payload)
        head = self._frame(_HEADERS, _END_HEADERS, stream_id, self._header_block())
        self._send(stream_id, head)

    def close(self) -> None:
        """Drop it; calls under way are not told of."""
        self._streams.clear()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet. No header table: then equal header blocks mean equal headers, and each is decoded once."""
        self._transport = cast("asyncio.Transport", transport)
        settings = _SETTING.pack(_HEADER_TABLE_SIZE, 0) + _SETTING.pack(_INITIAL_WINDOW_SIZE, _LARGEST_WINDOW)
        more = self._frame(_WINDOW_UPDATE, 0, 0, _NUMBER.pack(_LARGEST_WINDOW - 65_535))
        self._transport.write(_PREFACE + self._frame(_SETTINGS, 0, 0, settings) + more)

    def data_received(self, data: bytes) -> None:
        """Take every whole frame."""
        buffer = self._buffer
        buffer += data
        start, end = 0, len(buffer)
        while end - start >= 9:
            stop = start + 9 + int.from_bytes(buffer[start : start + 3], "big")
            if stop > end:
                break
            stream_id = int.from_bytes(buffer[start + 5 : start + 9], "big") & _MAX_STREAM
            self._take(buffer[start + 3], buffer[start + 4], stream_id, bytes(buffer[start + 9 : stop]))
            start = stop
        del buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        """Every call under way has failed."""
        self._transport = None
        self._fail_all(f"connection lost: {exc or 'closed by the server'}")

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == _DATA:
            self._take_data(flags, stream_id, payload)
        elif kind == _HEADERS:
            self._take_headers(flags, stream_id, payload)
        elif kind == _SETTINGS and not flags & _ACK:
            self._take_settings(payload)
        elif kind == _WINDOW_UPDATE:
            self._take_window(stream_id, _NUMBER.unpack(payload)[0] & _LARGEST_WINDOW)
        elif kind == _PING and not flags & _ACK:
            self._write(self._frame(_PING, _ACK, 0, payload))
        elif kind == _RST_STREAM:
            self._finish(stream_id, f"stream reset with code {_NUMBER.unpack(payload)[0]}")
        elif kind == _GOAWAY:
            self._fail_all("the server says GOAWAY")
            self.close()

    def _take_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._received_bytes += len(payload)
        if self._received_bytes >= _RETURN_BYTES:
            self._write(self._frame(_WINDOW_UPDATE, 0, 0, _NUMBER.pack(self._received_bytes)))
            self._received_bytes = 0
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.body += payload[1 : len(payload) - payload[0]] if flags & _PADDED else payload
            if flags & _END_STREAM:
                self._finish(stream_id, "the answer has no trailers")

    def _take_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & _PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        if flags & _PRIORITY:
            payload = payload[5:]
        stream = self._streams.get(stream_id)
        if not flags & _END_HEADERS:
            self._finish(stream_id, "the answer's headers are in several frames, which this client does not read")
        elif stream is not None:
            stream.headers |= self._decode(payload)
            if flags & _END_STREAM:
                status = stream.headers.get("grpc-status", "none")
                told = f"gRPC status {status}: {stream.headers.get('grpc-message', '')[:160]}"
                self._finish(stream_id, None if status == "0" else told)

    def _take_settings(self, payload: bytes) -> None:
        for name, value in _SETTING.iter_unpack(payload):
            if name == _INITIAL_WINDOW_SIZE:
                for stream in self._streams.values():
                    stream.window += value - self._initial_window
                self._initial_window = value
            elif name == _MAX_FRAME_SIZE:
                self._frame_bytes = value
            elif name == _HEADER_TABLE_SIZE:
                self._encoder.header_table_size = min(value, 4096)
                self._repeated = None
        self._write(self._frame(_SETTINGS, _ACK, 0, b""))
        if not self.ready.done():
            self.ready.set_result(None)
        self._unblock()

    def _take_window(self, stream_id: int, increment: int) -> None:
        if stream_id == 0:
            self._window += increment
        elif stream_id in self._streams:
            self._streams[stream_id].window += increment
        self._unblock()

    def _unblock(self) -> None:
        for _ in range(len(self._blocked)):
            self._send(self._blocked.popleft(), b"")

    def _send(self, stream_id: int, head: bytes) -> None:
        """``head`` and as much of the message as the windows let through; the rest waits for them."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        parts = [head]
        while stream.sent_bytes < len(stream.payload):
            size = min(len(stream.payload) - stream.sent_bytes, self._frame_bytes, self._window, stream.window)
            if size <= 0:
                self._blocked.append(stream_id)
                break
            end = stream.sent_bytes + size
            flags = _END_STREAM if end == len(stream.payload) else 0
            parts.append(self._frame(_DATA, flags, stream_id, stream.payload[stream.sent_bytes : end]))
            stream.sent_bytes = end
            stream.window -= size
            self._window -= size
        self._write(b"".join(parts))

    def _header_block(self) -> bytes:
        """The request's headers, equal from the second on: the server's table holds them after the first."""
        if self._repeated is not None:
            return self._repeated
        fields = [(":method", "POST"), (":scheme", "http"), *self._names]
        block = cast("bytes", self._encoder.encode(fields))
        self._repeated = cast("bytes", self._encoder.encode(fields))
        # Encoded twice and sent once: the second only refers to entries that the first has made.
        return block

    def _decode(self, block: bytes) -> dict[str, str]:
        found = self._decoded.get(block)
        if found is None:
            found = {str(name): str(value) for name, value in hpack.Decoder().decode(block)}
            if len(self._decoded) < 256:  # dates may make each block another
                self._decoded[block] = found
        return found

    def _finish(self, stream_id: int, problem: str | None) -> None:
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            body = stream.body
            if problem is None and (len(body) < 5 or body[0] or len(body) != 5 + int.from_bytes(body[1:5], "big")):
                problem = f"the answer of {len(body)} bytes is not one plain gRPC message"
            stream.answered(bytes(body[5:]), problem)

    def _fail_all(self, problem: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(problem))
        for stream_id in tuple(self._streams):
            self._finish(stream_id, problem)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    @staticmethod
    def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def _payload(message: bytes) -> bytes:
    return _MESSAGE.pack(0, len(message)) + message
