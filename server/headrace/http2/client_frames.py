"""What each frame of an HTTP/2 client does: streams are opened, fed, given room and given up.

No frame may cost more than its bytes: what a frame sets off is bounded, whatever else the client has done before, and
what cannot be bounded so (a change of all windows) comes out of an allowance. So a client that sends nonsense as fast
as it can takes no more of the server than one that sends requests.
"""

from asyncio import get_running_loop
from collections.abc import Callable
from typing import Generic, TypeVar

from headrace.http2 import frames
from headrace.http2.frames import ConnectionFault, ErrorCode, Setting
from headrace.http2.headers import MAX_HEADER_BYTES, NO_TABLE, HeaderReader, Headers, HeadersTooLarge
from headrace.http2.incoming import Incoming
from headrace.http2.patience import Patience
from headrace.http2.stream import Stream

MAX_STREAMS = 16_384  # of one connection at once
STREAM_WINDOW = 4 * 1024 * 1024  # bytes that a client may send on one stream before anybody has looked at them
CONNECTION_WINDOW = 64 * 1024 * 1024  # the same for all streams of a connection; given back as they arrive
MAX_UNSENT_BYTES = 512 * 1024 * 1024  # of responses that a client makes no room for: it gets no new streams
MAX_IDLE_FRAMES = 1000  # frames with nothing in them, beyond those that the number of requests explains
SETTINGS_BURST, SETTINGS_RATE = 1000, 100  # changes of all windows; each costs what the open streams cost
STREAMS_A_CHANGE = 256
STOPPING = b"stopping"  # the payload of the ping that follows the first GOAWAY

Head = TypeVar("Head")
Accept = Callable[["ClientFrames[Head]", int, Head, bool], Stream]


class ClientFrames(Incoming, Generic[Head]):
    """Does what the frames say, and ends the stream or the connection of a client that may not say so."""

    def __init__(self, accept: Accept[Head], parse: Callable[[Headers], Head]) -> None:
        super().__init__()
        self._accept = accept
        self._reader = HeaderReader(parse)
        self._last_stream = 0
        self._asked_to_leave = False  # the client was, and is to show that it has read so
        self._open_block: tuple[int, int, list[bytes]] | None = None  # headers that a CONTINUATION is to complete
        self._receivable = CONNECTION_WINDOW
        self._idle_frames = 0
        self._table_bytes = frames.DEFAULT_TABLE_BYTES  # the most that this end may fill of the client's header table
        self._patience = Patience(SETTINGS_BURST, SETTINGS_RATE, get_running_loop().time())

    def new_stream_windows(self) -> tuple[int, int]:
        """How much may be sent on a stream that is new, and how much the client may send."""
        return self._initial_send_window, STREAM_WINDOW

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
        else:
            self._take_rare_frame(kind, flags, stream_id, payload)

    def _take_rare_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == frames.SETTINGS:
            self._on_settings(flags, stream_id, payload)
        elif kind == frames.CONTINUATION:
            self._on_continuation(flags, payload)
        elif kind == frames.PUSH_PROMISE:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a client cannot push")
        elif kind == frames.GOAWAY:
            if stream_id:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a GOAWAY frame is on a stream")
            # The client ends by itself, when it has all that it waits for.
        elif kind == frames.PRIORITY:
            self._on_priority(stream_id, payload)
        else:
            self._on_idle_frame()  # of a kind that this end need not know

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._receivable -= size
        if self._receivable < CONNECTION_WINDOW // 2:
            self.transport.write(frames.window_update(0, CONNECTION_WINDOW - self._receivable))
            self._receivable = CONNECTION_WINDOW
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_known(stream_id, "DATA")
            return  # of a stream that is over, and its client did not know yet
        if stream.remote_ended:
            self._lose(stream, ErrorCode.STREAM_CLOSED)
            return
        stream.receivable -= size
        if stream.receivable < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"stream {stream_id} got more than it has room for")
        if flags & frames.PADDED:
            payload = frames.unpadded(payload, flags)
        ended = bool(flags & frames.END_STREAM)
        if not payload and not ended:
            self._on_idle_frame()
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
        try:
            head = self._reader.read(block)  # also where nobody wants it: the next block builds on it
        except HeadersTooLarge:
            self._refuse_headers(stream_id)
            return
        ended = bool(flags & frames.END_STREAM)
        if stream_id <= self._last_stream:
            self._on_trailers(stream_id, ended=ended)
            return
        if not stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a client cannot open stream {stream_id}")
        self._last_stream = stream_id
        if self._leaving or len(self._streams) >= MAX_STREAMS or self._unsent_bytes > MAX_UNSENT_BYTES:
            self.transport.write(frames.rst_stream(stream_id, ErrorCode.REFUSED_STREAM))
            return
        stream = self._accept(self, stream_id, head, ended)
        if stream.over:
            return  # refused for what its headers say
        self._streams[stream_id] = stream
        if ended:
            stream.remote_ended = True
            stream.receive(b"", ended=True)

    def _refuse_headers(self, stream_id: int) -> None:
        """Headers of a stream are too large; others on the connection have nothing to do with that."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._lose(stream, ErrorCode.ENHANCE_YOUR_CALM)
        elif stream_id & 1:
            self._last_stream = max(self._last_stream, stream_id)
            self.transport.write(frames.rst_stream(stream_id, ErrorCode.ENHANCE_YOUR_CALM))
        else:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a client cannot open stream {stream_id}")

    def _on_trailers(self, stream_id: int, *, ended: bool) -> None:
        """Headers of a stream that was opened before; in a gRPC request they say nothing, but end it."""
        if not stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a client cannot open stream {stream_id}")
        stream = self._streams.get(stream_id)
        if stream is None:
            return  # it is over, and its client did not know yet
        if stream.remote_ended:
            self._lose(stream, ErrorCode.STREAM_CLOSED)
        elif not ended:
            self._lose(stream, ErrorCode.PROTOCOL_ERROR)
        else:
            stream.remote_ended = True
            stream.receive(b"", ended=True)

    def _on_window_update(self, stream_id: int, payload: bytes) -> None:
        increment = frames.read_increment(payload)
        if not stream_id:
            if not increment:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a window cannot grow by 0")
            self._send_window += increment
            if self._send_window > frames.MAX_WINDOW:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"a window cannot grow to {self._send_window}")
            self._send_waiting()
            return
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_known(stream_id, "WINDOW_UPDATE")
            return
        stream.send_window += increment
        if not increment:
            self._lose(stream, ErrorCode.PROTOCOL_ERROR)
        elif stream.send_window > frames.MAX_WINDOW:
            self._lose(stream, ErrorCode.FLOW_CONTROL_ERROR)
        elif stream.unsent is not None and stream.unsent.size:
            self.advance(stream)

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a PING frame is on a stream")
        if len(payload) != 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a PING frame has {len(payload)} bytes, expected 8")
        if not flags & frames.ACK:
            self.transport.write(frames.ping(payload, frames.ACK))
        elif payload == STOPPING and self._asked_to_leave:
            self._take_no_more()

    def _on_rst_stream(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"an RST_STREAM frame has {len(payload)} bytes")
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_known(stream_id, "RST_STREAM")
        else:
            # However many a client resets: each costs less than if it were answered, and those that wait in a queue
            # count there until they are dropped.
            self._lose(stream)

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a SETTINGS frame is on a stream")
        if flags & frames.ACK:
            if payload:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "an acknowledgement of SETTINGS has a payload")
            return
        if not self._patience.bears(1 + len(self._streams) // STREAMS_A_CHANGE, get_running_loop().time()):
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "so many SETTINGS frames have no use")
        values = frames.read_settings(payload)
        self._flush()
        self.transport.write(frames.SETTINGS_ACK)  # before what the new windows let out, which may be the last
        if values.get(Setting.HEADER_TABLE_SIZE, self._table_bytes) < self._table_bytes:
            # Nothing that is sent goes into the client's table, and yet it must hear that the table has become smaller.
            self._table_bytes, self._before_block = 0, NO_TABLE
        if (size := values.get(Setting.INITIAL_WINDOW_SIZE)) is not None:
            self._resize_windows(size)
        if (size := values.get(Setting.MAX_FRAME_SIZE)) is not None:
            self._set_frame_bytes(size)

    def _on_priority(self, stream_id: int, payload: bytes) -> None:
        """Nothing of it is heeded, but it must be one."""
        if not stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a PRIORITY frame is on no stream")
        if len(payload) != 5:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a PRIORITY frame has {len(payload)} bytes, expected 5")
        self._on_idle_frame()

    def _on_idle_frame(self) -> None:
        """A frame that brings nothing: some are all right, and more where there are more requests."""
        self._idle_frames += 1
        if self._idle_frames > MAX_IDLE_FRAMES + self._last_stream:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"{self._idle_frames} frames brought nothing")

    def _check_known(self, stream_id: int, what: str) -> None:
        """A frame for a stream that is not open: it was once, or the client is wrong."""
        if not stream_id & 1 or stream_id > self._last_stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"a {what} frame is for stream {stream_id}, not yet open")

    def _lose(self, stream: Stream, code: ErrorCode | None = None) -> None:
        """The stream is given up by the client, or because of it."""
        if code is not None:
            self.transport.write(frames.rst_stream(stream.id, code))
        self._forget(stream)
        stream.lost()

    # -- for the class that is made of this one -----------------------------------------------------------

    def _take_no_more(self) -> None:
        """The client has been asked to leave, and has read that: streams that it opens from now on are not taken."""
        raise NotImplementedError
