"""One HTTP/2 connection, the server's end: frames in, streams opened and fed, frames out within the peer's windows."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from headrace.http2 import frames
from headrace.http2.frames import ConnectionFault, ErrorCode, Setting
from headrace.http2.headers import MAX_HEADER_BYTES, HeaderReader, Headers
from headrace.http2.stream import Buffer, Stream

log = logging.getLogger(__name__)

MAX_STREAMS = 16_384  # of one connection at once
STREAM_WINDOW = 4 * 1024 * 1024  # bytes that a client may send on one stream before anybody has looked at them
CONNECTION_WINDOW = 64 * 1024 * 1024  # the same for all streams of a connection; given back as they arrive
FRAME_BYTES = 1024 * 1024  # the largest frame that clients may send; a large tensor is then a few pieces
MAX_REPLIES_BYTES = 1024 * 1024  # waiting to be sent: a client that does not read them is not read from
JOIN_BYTES = 64 * 1024  # copying so little costs less than a second buffer on its way through the transport
PREFACE_TIMEOUT_S = 20.0
_STOPPING = b"stopping"  # the payload of the ping that follows the first GOAWAY

Head = TypeVar("Head")
Accept = Callable[["Connection[Head]", int, Head], Stream]


class Connection(asyncio.Protocol, Generic[Head]):
    """Speaks HTTP/2 with one client and has ``accept`` make a stream of each of its requests.

    ``parse`` makes of a request's headers what ``accept`` is given. ``crowd`` is the set of all connections, which
    this one is in for as long as it is open.
    """

    def __init__(self, accept: Accept[Head], parse: Callable[[Headers], Head], crowd: "set[Connection[Head]]") -> None:
        self._accept = accept
        self._reader = HeaderReader(parse)
        self._crowd = crowd
        self._streams: dict[int, Stream] = {}
        self._last_stream = 0
        self._asked_to_leave = False
        self._leaving = False  # no more streams are taken
        self._closed = False  # nothing is read any more
        self._expects_preface = True
        self._rest: list[bytes] = []  # of what was read, short of a whole frame
        self._rest_bytes = 0
        self._needed = len(frames.PREFACE)
        self._open_block: tuple[int, int, list[bytes]] | None = None  # headers that a CONTINUATION is to complete
        self._send_window = frames.DEFAULT_WINDOW
        self._initial_send_window = frames.DEFAULT_WINDOW
        self._frame_bytes = frames.DEFAULT_FRAME_BYTES
        self._receivable = CONNECTION_WINDOW
        self._stalled: dict[int, Stream] = {}  # streams with something to send and no room for it
        self._timer: asyncio.TimerHandle | None = None

    # -- the transport's callbacks ------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Say what this end allows."""
        self.transport: asyncio.Transport = transport
        transport.set_write_buffer_limits(high=MAX_REPLIES_BYTES)
        self._crowd.add(self)
        self._timer = asyncio.get_running_loop().call_later(PREFACE_TIMEOUT_S, self._give_up_on_preface)
        transport.write(
            frames.settings(
                (
                    (Setting.MAX_CONCURRENT_STREAMS, MAX_STREAMS),
                    (Setting.INITIAL_WINDOW_SIZE, STREAM_WINDOW),
                    (Setting.MAX_FRAME_SIZE, FRAME_BYTES),
                    (Setting.MAX_HEADER_LIST_SIZE, MAX_HEADER_BYTES),
                )
            )
            + frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW)
        )

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """The client has left: what it waited for need not be computed."""
        self._crowd.discard(self)
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._lose_all()

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._closed:
            return
        if self._rest:
            self._rest.append(data)
            self._rest_bytes += len(data)
            if self._rest_bytes < self._needed:
                return
            data = b"".join(self._rest)
            self._rest.clear()
        try:
            used = self._take_frames(data)
        except ConnectionFault as fault:
            self._end_with(fault.code, str(fault))
        except Exception:
            log.exception("an HTTP/2 connection cannot go on")
            self._end_with(ErrorCode.INTERNAL_ERROR, "the server's log says why")
        else:
            if used < len(data):
                self._rest.append(data[used:])
                self._rest_bytes = len(data) - used

    def pause_writing(self) -> None:
        """The client does not read: do not listen to it either."""
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """The client reads again."""
        self.transport.resume_reading()

    # -- frames -------------------------------------------------------------------------------------------

    def _take_frames(self, data: bytes) -> int:
        """Deal with every whole frame in ``data`` and return how much of it that was."""
        position = 0
        size = len(data)
        if self._expects_preface:
            if not frames.PREFACE.startswith(data[: len(frames.PREFACE)]):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "expected HTTP/2, as gRPC speaks it")
            if size < len(frames.PREFACE):
                self._needed = len(frames.PREFACE)
                return 0
            position = len(frames.PREFACE)
            self._expects_preface = False
            if self._timer is not None:
                self._timer.cancel()
        read_header = frames.read_header
        while size - position >= frames.HEADER_BYTES:
            high, low, kind, flags, stream_id = read_header(data, position)
            length = high << 16 | low
            start = position + frames.HEADER_BYTES
            end = start + length
            if length > FRAME_BYTES:
                raise ConnectionFault(
                    ErrorCode.FRAME_SIZE_ERROR, f"a frame has {length} bytes, expected at most {FRAME_BYTES}"
                )
            if end > size:
                self._needed = end - position
                return position
            self._take_frame(kind, flags, stream_id & frames.MAX_WINDOW, data[start:end])
            position = end
            if self._closed:
                return size
        self._needed = frames.HEADER_BYTES
        return position

    def _take_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if self._open_block is not None and (kind != frames.CONTINUATION or stream_id != self._open_block[0]):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a header block is interrupted by another frame")
        if kind == frames.DATA:
            self._on_data(flags, stream_id, payload)
        elif kind == frames.HEADERS:
            self._on_headers(flags, stream_id, payload)
        elif kind == frames.WINDOW_UPDATE:
            self._on_window_update(stream_id, payload)
        elif kind == frames.PING:
            self._on_ping(flags, stream_id, payload)
        elif kind == frames.RST_STREAM:
            self._on_rst_stream(stream_id, payload)
        elif kind == frames.SETTINGS:
            self._on_settings(flags, stream_id, payload)
        elif kind == frames.CONTINUATION:
            self._on_continuation(flags, payload)
        elif kind == frames.PUSH_PROMISE:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a client cannot push")
        # PRIORITY says nothing that is heeded, after GOAWAY a client ends by itself, and unknown frames are allowed.

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._receivable -= size
        if self._receivable < CONNECTION_WINDOW // 2:
            self.transport.write(frames.window_update(0, CONNECTION_WINDOW - self._receivable))
            self._receivable = CONNECTION_WINDOW
        stream = self._streams.get(stream_id)
        if stream is None or stream.remote_ended:
            self._check_known(stream_id, "DATA")
            return  # of a stream that is over, and its client did not know yet
        stream.receivable -= size
        if stream.receivable < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"stream {stream_id} got more than it has room for")
        if flags & frames.PADDED:
            payload = frames.unpadded(payload, flags)
        ended = bool(flags & frames.END_STREAM)
        stream.remote_ended = ended
        stream.receive(payload, ended=ended)

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & (frames.PADDED | frames.WITH_PRIORITY):
            payload = frames.unpadded(payload, flags, with_priority=True)
        if flags & frames.END_HEADERS:
            self._on_header_block(flags, stream_id, payload)
        else:
            self._open_block = stream_id, flags, [payload]

    def _on_continuation(self, flags: int, payload: bytes) -> None:
        if self._open_block is None:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a CONTINUATION frame continues nothing")
        stream_id, first_flags, pieces = self._open_block
        pieces.append(payload)
        if sum(map(len, pieces)) > MAX_HEADER_BYTES or len(pieces) > MAX_HEADER_BYTES // 1024:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"headers of more than {MAX_HEADER_BYTES} bytes")
        if flags & frames.END_HEADERS:
            self._open_block = None
            self._on_header_block(first_flags, stream_id, b"".join(pieces))

    def _on_header_block(self, flags: int, stream_id: int, block: bytes) -> None:
        head = self._reader.read(block)  # also where nobody wants it: the next block builds on it
        stream = self._streams.get(stream_id)
        ended = bool(flags & frames.END_STREAM)
        if stream_id <= self._last_stream:
            if stream is not None and not stream.remote_ended:
                if not ended:
                    raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} has headers twice")
                stream.remote_ended = True
                stream.receive(b"", ended=True)  # trailers of a request say nothing in gRPC
            return
        if not stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a client cannot open stream {stream_id}")
        self._last_stream = stream_id
        if self._leaving or len(self._streams) >= MAX_STREAMS:
            self.transport.write(frames.rst_stream(stream_id, ErrorCode.REFUSED_STREAM))
            return
        stream = self._accept(self, stream_id, head)
        if stream.over:
            return  # refused for what its headers say
        self._streams[stream_id] = stream
        if ended:
            stream.remote_ended = True
            stream.receive(b"", ended=True)

    def _on_window_update(self, stream_id: int, payload: bytes) -> None:
        increment = frames.read_increment(payload)
        if not stream_id:
            self._send_window += increment
            if not increment or self._send_window > frames.MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"a window cannot grow by {increment}")
            self._advance_stalled()
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_known(stream_id, "WINDOW_UPDATE")
            return
        stream.send_window += increment
        if not increment or stream.send_window > frames.MAX_WINDOW:
            self._lose(stream, ErrorCode.FLOW_CONTROL_ERROR)
        elif stream.unsent:
            self.advance(stream)

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a PING frame is on a stream")
        if len(payload) != 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a PING frame has {len(payload)} bytes, expected 8")
        if not flags & frames.ACK:
            self.transport.write(frames.ping(payload, frames.ACK))
        elif payload == _STOPPING and self._asked_to_leave and not self._leaving:
            self._take_no_more()

    def _on_rst_stream(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"an RST_STREAM frame has {len(payload)} bytes")
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_known(stream_id, "RST_STREAM")
        else:
            self._lose(stream)

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a SETTINGS frame is on a stream")
        if flags & frames.ACK:
            return
        for name, value in frames.read_settings(payload):
            if name == Setting.INITIAL_WINDOW_SIZE:
                if value > frames.MAX_WINDOW:
                    raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
                for stream in self._streams.values():
                    stream.send_window += value - self._initial_send_window
                self._initial_send_window = value
            elif name == Setting.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME_BYTES <= value <= frames.MAX_FRAME_BYTES:
                    raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"frames of {value} bytes")
                self._frame_bytes = value
        self.transport.write(frames.SETTINGS_ACK)
        self._advance_stalled()

    def _check_known(self, stream_id: int, what: str) -> None:
        """A frame for a stream that is not open: it was once, or the client is wrong."""
        if not stream_id or stream_id > self._last_stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a {what} frame is for stream {stream_id}, not yet open")

    # -- what streams send --------------------------------------------------------------------------------

    def new_stream_windows(self) -> tuple[int, int]:
        """How much may be sent on a stream that is new, and how much the client may send."""
        return self._initial_send_window, STREAM_WINDOW

    def respond(self, stream: Stream, block: bytes, pieces: Sequence[Buffer], size: int, end_block: bytes) -> None:
        """Send a whole response of ``size`` bytes: in one write where the client has room for all of it."""
        if stream.over:
            return
        if size > self._send_window or size > stream.send_window or size > self._frame_bytes:
            self.send_headers(stream, block)
            stream.end_block = end_block
            stream.send(*pieces)
            return
        self._send_window -= size
        number = stream.id.to_bytes(4, "big")
        buffers = (
            *(len(block).to_bytes(3, "big"), b"\x01\x04", number, block),  # HEADERS, END_HEADERS
            *(size.to_bytes(3, "big"), b"\x00\x00", number, *pieces),  # DATA
            *(len(end_block).to_bytes(3, "big"), b"\x01\x05", number, end_block),  # HEADERS, END_STREAM too
        )
        if size <= JOIN_BYTES:
            self.transport.write(b"".join(buffers))
        else:
            self.transport.writelines(buffers)
        self._finish(stream)

    def send_headers(self, stream: Stream, block: bytes) -> None:
        """Send a header block that does not end the stream."""
        self.transport.write(frames.header(len(block), frames.HEADERS, frames.END_HEADERS, stream.id) + block)

    def advance(self, stream: Stream) -> None:
        """Send as much of what waits on the stream as may be sent now."""
        unsent = stream.unsent
        while unsent:
            room = min(self._send_window, stream.send_window, self._frame_bytes)
            if room <= 0:
                self._stalled[stream.id] = stream
                return
            piece = unsent[0]
            if len(piece) <= room:
                unsent.popleft()
            else:
                unsent[0] = piece[room:]
                piece = piece[:room]
            size = len(piece)
            self._send_window -= size
            stream.send_window -= size
            self.transport.writelines((frames.header(size, frames.DATA, 0, stream.id), piece))
        self._stalled.pop(stream.id, None)
        if stream.end_block is not None:
            block = stream.end_block
            flags = frames.END_HEADERS | frames.END_STREAM
            self.transport.write(frames.header(len(block), frames.HEADERS, flags, stream.id) + block)
            self._finish(stream)
        else:
            stream.note_drained()

    def grant(self, stream: Stream, size: int) -> None:
        """Allow the peer to send so many bytes more."""
        stream.receivable += size
        self.transport.write(frames.window_update(stream.id, size))

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """End the stream at once."""
        self.transport.write(frames.rst_stream(stream.id, code))
        self._forget(stream)

    def _advance_stalled(self) -> None:
        for stream in list(self._stalled.values()):
            if self._send_window <= 0:
                return
            self.advance(stream)

    def _finish(self, stream: Stream) -> None:
        """The response is sent whole."""
        if not stream.remote_ended:
            # Nobody will look at the rest of the request: have the client stop sending it.
            self.transport.write(frames.rst_stream(stream.id, ErrorCode.NO_ERROR))
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        stream.over = True
        stream.unsent = None
        self._streams.pop(stream.id, None)
        self._stalled.pop(stream.id, None)
        stream.note_drained()
        if self._leaving and not self._streams:
            self.transport.close()

    # -- the end ------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is under way on it."""
        return not self._streams

    def leave(self) -> None:
        """The server is stopping: take no more requests, and close when those under way are answered.

        The client learns first that it should stop, and only when it must have read that, which its answer to a
        ping shows, which of its requests were taken: so none of them is lost on the way (RFC 9113, section 6.8).
        """
        if self._closed or self._expects_preface:
            self.transport.close()
            return
        self._asked_to_leave = True
        self.transport.write(
            frames.goaway(frames.MAX_WINDOW, ErrorCode.NO_ERROR, "the server is stopping") + frames.ping(_STOPPING)
        )

    def give_up(self) -> None:
        """The server's time to stop is over: end what is still under way, and the connection with it."""
        for stream in list(self._streams.values()):
            stream.stop()
        self.transport.close()

    def _take_no_more(self) -> None:
        self._leaving = True
        self.transport.write(frames.goaway(self._last_stream, ErrorCode.NO_ERROR, "the server is stopping"))
        if not self._streams:
            self.transport.close()

    def _lose(self, stream: Stream, code: ErrorCode | None = None) -> None:
        """The stream is given up by the client, or because of it."""
        if code is not None:
            self.transport.write(frames.rst_stream(stream.id, code))
        self._forget(stream)
        stream.lost()

    def _lose_all(self) -> None:
        for stream in list(self._streams.values()):
            self._forget(stream)
            stream.lost()

    def _give_up_on_preface(self) -> None:
        self.transport.close()

    def _end_with(self, code: ErrorCode, why: str) -> None:
        """Tell the client what it did wrong and close."""
        self._closed = True
        log.info("an HTTP/2 connection is closed: %s (%s)", why, code.name)
        self.transport.write(frames.goaway(self._last_stream, code, why))
        self._lose_all()
        self.transport.close()
