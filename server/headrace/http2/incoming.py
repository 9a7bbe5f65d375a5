"""The receiving half of an HTTP/2 connection: bytes in, whole frames out, and other connections served in between."""

import logging
from asyncio import get_running_loop

from headrace.http2 import frames
from headrace.http2.frames import ConnectionFault, ErrorCode
from headrace.http2.outgoing import TRANSPORT_BYTES, Outgoing

log = logging.getLogger(__name__)

FRAME_BYTES = 1024 * 1024  # the largest frame that clients may send; a large tensor is then a few pieces
TURN_FRAMES = 1024  # dealt with in a row, before other connections have their turn
MAX_PIECES = 1024  # of an incomplete frame: each has a size of its own, so that many small ones are joined


class Incoming(Outgoing):
    """Cuts what comes into frames for ``_take_frame``, and stops reading where the client does."""

    def __init__(self) -> None:
        super().__init__()
        self._closed = False  # nothing is read any more
        self._expects_preface = True
        self._rest: list[bytes] = []  # of what was read, short of a whole frame
        self._rest_bytes = 0
        self._needed = len(frames.PREFACE)
        self._put_off = False  # whole frames are in the rest, and will have their turn

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._closed:
            return
        if self._rest:
            self._rest.append(data)
            self._rest_bytes += len(data)
            if self._rest_bytes < self._needed or self._put_off:
                if len(self._rest) > MAX_PIECES:
                    self._rest = [b"".join(self._rest)]
                return
            data = b"".join(self._rest)
            self._rest.clear()
        try:
            used = self._take_frames(data)
        except ConnectionFault as fault:
            self._end_with(fault.code, str(fault))
            return
        except Exception:
            log.exception("an HTTP/2 connection cannot go on")
            self._end_with(ErrorCode.INTERNAL_ERROR, "the server's log says why")
            return
        if used < len(data):
            self._rest.append(data[used:])
            self._rest_bytes = len(data) - used
            if self._rest_bytes >= self._needed:
                self._put_off = True
                self.transport.pause_reading()
                get_running_loop().call_soon(self._take_turn)
        if self._full:
            self._listen()

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._listen()

    def _take_turn(self) -> None:
        """Go on with what was put off so that others had their turn."""
        self._put_off = False
        if not self._closed:
            data = b"".join(self._rest)
            self._rest.clear()
            self.data_received(data)
            self._listen()

    def _listen(self) -> None:
        """Read from the client, unless it has not read so much that even short answers cannot be kept for it."""
        if self._put_off or (self._full and self.transport.get_write_buffer_size() > 2 * TRANSPORT_BYTES):
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def _take_frames(self, data: bytes) -> int:
        """Deal with the whole frames in ``data``, up to a number of them, and return how much of it they were."""
        position = 0
        size = len(data)
        if self._expects_preface:
            position = self._take_preface(data)
            if not position:
                return size if self._closed else 0
        read_header = frames.read_header
        for _ in range(TURN_FRAMES):
            if size - position < frames.HEADER_BYTES:
                break
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

    def _take_preface(self, data: bytes) -> int:
        """How long the preface is, once it is there; then this end says what it allows."""
        given = data[: len(frames.PREFACE)]
        if not frames.PREFACE.startswith(given):
            self._refuse_protocol(data)
            return 0
        if len(data) < len(frames.PREFACE) + frames.HEADER_BYTES:
            self._needed = len(frames.PREFACE) + frames.HEADER_BYTES
            return 0
        self._expects_preface = False
        self._begin()
        _, _, kind, flags, _ = frames.read_header(data, len(frames.PREFACE))
        if kind != frames.SETTINGS or flags & frames.ACK:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame is not the client's SETTINGS")
        return len(frames.PREFACE)

    def _refuse_protocol(self, data: bytes) -> None:
        """Whatever this is, it is not HTTP/2; a client of HTTP/1 is told so in its own terms."""
        log.info("a connection is closed: it begins with %r, and not as HTTP/2 does", data[:24])
        if data[:1].isalpha() and data[:1].isupper():
            self.transport.write(frames.NO_HTTP_1)
        self._close()

    # -- for the class that is made of this one -----------------------------------------------------------

    def _begin(self) -> None:
        """The client speaks HTTP/2."""
        raise NotImplementedError

    def _take_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """A frame is whole."""
        raise NotImplementedError

    def _end_with(self, code: ErrorCode, why: str) -> None:
        """Tell the client what it did wrong and close."""
        raise NotImplementedError
