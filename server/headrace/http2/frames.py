"""What HTTP/2 frames look like on the wire (RFC 9113, sections 4 and 6)."""

from collections.abc import Iterable
from enum import IntEnum
from struct import Struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_NO_HTTP_1 = b'{"error":"this port speaks HTTP/2 only, as gRPC does"}'
NO_HTTP_1 = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_NO_HTTP_1), _NO_HTTP_1)
)
HEADER_BYTES = 9
DEFAULT_WINDOW = 65_535
DEFAULT_TABLE_BYTES = 4096
MAX_WINDOW = 2**31 - 1
DEFAULT_FRAME_BYTES = 16_384
MAX_FRAME_BYTES = 2**24 - 1

# Types.
DATA = 0x0
HEADERS = 0x1
PRIORITY = 0x2
RST_STREAM = 0x3
SETTINGS = 0x4
PUSH_PROMISE = 0x5
PING = 0x6
GOAWAY = 0x7
WINDOW_UPDATE = 0x8
CONTINUATION = 0x9

# Flags.
END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
WITH_PRIORITY = 0x20

read_header = Struct(">BHBBI").unpack_from  # the length's high byte and the rest of it, type, flags, stream
_HEADER = Struct(">BHBBI").pack
_LONG = Struct(">I")
_TWO_LONGS = Struct(">II")
_SETTING = Struct(">HI")


class Setting(IntEnum):
    """What the ends tell each other of themselves (RFC 9113, section 6.5.2)."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class ErrorCode(IntEnum):
    """Why a stream or a connection ends (RFC 9113, section 7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class ConnectionFault(Exception):
    """The peer broke the protocol in a way that the whole connection ends with."""

    def __init__(self, code: ErrorCode, what: str) -> None:
        super().__init__(what)
        self.code = code


def header(length: int, kind: int, flags: int, stream: int) -> bytes:
    """The nine bytes in front of every frame's payload."""
    return _HEADER(length >> 16, length & 0xFFFF, kind, flags, stream)


def settings(values: Iterable[tuple[Setting, int]]) -> bytes:
    """A SETTINGS frame."""
    payload = b"".join(_SETTING.pack(name, value) for name, value in values)
    return header(len(payload), SETTINGS, 0, 0) + payload


SETTINGS_ACK = header(0, SETTINGS, ACK, 0)


def read_settings(payload: bytes) -> dict[int, int]:
    """The settings in a SETTINGS frame, known or not; of one that is there twice, the last value counts.

    Raises:
        ConnectionFault: the frame ends in the middle of one, or a value is none that the setting can have.
    """
    if len(payload) % _SETTING.size:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a SETTINGS frame has {len(payload)} bytes")
    values: dict[int, int] = {}
    for name, value in _SETTING.iter_unpack(payload):
        if name == Setting.INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
        if name == Setting.MAX_FRAME_SIZE and not DEFAULT_FRAME_BYTES <= value <= MAX_FRAME_BYTES:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"frames of {value} bytes")
        if name == Setting.ENABLE_PUSH and value > 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH is {value}, expected 0 or 1")
        values[name] = value
    return values


def ping(payload: bytes, flags: int = 0) -> bytes:
    """A PING frame; with the flag ACK the answer to one."""
    return header(8, PING, flags, 0) + payload


def goaway(last_stream: int, code: ErrorCode, why: str = "") -> bytes:
    """A GOAWAY frame: streams after ``last_stream`` are not looked at."""
    text = why.encode()
    return header(8 + len(text), GOAWAY, 0, 0) + _TWO_LONGS.pack(last_stream, code) + text


def rst_stream(stream: int, code: ErrorCode) -> bytes:
    """An RST_STREAM frame: this stream is over."""
    return header(4, RST_STREAM, 0, stream) + _LONG.pack(code)


def window_update(stream: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame: so many bytes more may be sent on the stream, or with 0 on all together."""
    return header(4, WINDOW_UPDATE, 0, stream) + _LONG.pack(increment)


def read_increment(payload: bytes) -> int:
    """What a WINDOW_UPDATE frame gives.

    Raises:
        ConnectionFault: it has not the size of one.
    """
    if len(payload) != _LONG.size:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a WINDOW_UPDATE frame has {len(payload)} bytes")
    increment: int = _LONG.unpack(payload)[0] & MAX_WINDOW
    return increment


def unpadded(payload: bytes, flags: int, *, with_priority: bool = False) -> bytes:
    """The payload of a DATA or HEADERS frame without its padding, and without a priority, which is not looked at.

    Raises:
        ConnectionFault: the padding is longer than the frame.
    """
    start, end = 0, len(payload)
    if flags & PADDED:
        if not payload:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a padded frame is empty")
        start, end = 1, end - payload[0]
    if with_priority and flags & WITH_PRIORITY:
        start += 5
    if start > end:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a frame has more padding than it has bytes")
    return payload[start:end]
