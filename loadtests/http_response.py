"""HTTP/1.1 responses out of a stream of reads: no more of the protocol than an inference server uses."""

from typing import NamedTuple

MAX_HEAD_BYTES = 64 * 1024
_HEAD_END = b"\r\n\r\n"


class ProtocolError(Exception):
    """The server sent something that is not a response; the message says what."""


class Response(NamedTuple):
    """One whole response; ``head`` is its status line and headers, ``body`` is free of chunk framing."""

    status: int
    head: bytes
    body: bytes


class ResponseParser:
    """Takes reads as they come, gives back each response when its last byte is there.

    One request at a time is under way on a connection, so bytes behind a response are an error.
    """

    __slots__ = ("_body_start", "_buffer", "_chunk_start", "_chunks", "_length")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._body_start = 0
        self._chunk_start = 0
        self._length: int | None = None
        self._chunks: list[bytes] = []

    def feed(self, data: bytes) -> Response | None:
        """The response that ``data`` completes, or None.

        Raises:
            ProtocolError: the bytes are not an HTTP/1.1 response with a length.
        """
        if self._buffer:
            self._buffer += data
        elif (response := self._whole(data)) is not None:
            return response
        else:
            self._buffer = bytearray(data)
        if not self._body_start and not self._read_head():
            return None
        if self._length is None:
            return self._read_chunks()
        end = self._body_start + self._length
        if len(self._buffer) < end:
            return None
        return self._finish(bytes(self._buffer[self._body_start : end]), end)

    def _whole(self, data: bytes) -> Response | None:
        """The usual case, at a third of the cost: one read is one response with a length."""
        head_end = data.find(_HEAD_END)
        if head_end < 0:
            return None
        length = _content_length(data[:head_end].lower())
        if length is None or len(data) != head_end + 4 + length:
            return None
        return Response(_status(data), data[:head_end], data[head_end + 4 :])

    def _read_head(self) -> bool:
        head_end = self._buffer.find(_HEAD_END)
        if head_end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise ProtocolError(f"the response's head is over {MAX_HEAD_BYTES} bytes")
            return False
        head = bytes(self._buffer[:head_end]).lower()
        chunked = b"\r\ntransfer-encoding: chunked" in head or b"\r\ntransfer-encoding:chunked" in head
        self._length = None if chunked else _content_length(head)
        if self._length is None and not chunked:
            raise ProtocolError("the response has neither Content-Length nor chunked Transfer-Encoding")
        self._body_start = self._chunk_start = head_end + 4
        return True

    def _read_chunks(self) -> Response | None:
        while True:
            line_end = self._buffer.find(b"\r\n", self._chunk_start)
            if line_end < 0:
                return None
            size = _chunk_size(bytes(self._buffer[self._chunk_start : line_end]))
            if size == 0:
                return self._read_trailer(line_end)
            data_start, data_end = line_end + 2, line_end + 2 + size
            if len(self._buffer) < data_end + 2:
                return None
            if self._buffer[data_end : data_end + 2] != b"\r\n":
                raise ProtocolError(f"a chunk of {size} bytes does not end where it says")
            self._chunks.append(bytes(self._buffer[data_start:data_end]))
            self._chunk_start = data_end + 2

    def _read_trailer(self, line_end: int) -> Response | None:
        end = self._buffer.find(_HEAD_END, line_end)
        return None if end < 0 else self._finish(b"".join(self._chunks), end + 4)

    def _finish(self, body: bytes, end: int) -> Response:
        if len(self._buffer) != end:
            raise ProtocolError(f"{len(self._buffer) - end} bytes follow the response, and nobody asked for them")
        head = bytes(self._buffer[: self._body_start - 4])
        self._buffer, self._body_start, self._chunks = bytearray(), 0, []
        return Response(_status(head), head, body)


def _status(data: bytes) -> int:
    if not data.startswith(b"HTTP/1.") or not data[9:12].isdigit():
        raise ProtocolError(f"the response starts with {data[:16]!r}, expected an HTTP/1.1 status line")
    return int(data[9:12])


def _content_length(lower_head: bytes) -> int | None:
    start = lower_head.find(b"\r\ncontent-length:")
    if start < 0:
        return None
    line_end = lower_head.find(b"\r\n", start + 17)
    value = lower_head[start + 17 : line_end if line_end >= 0 else None].strip()
    if not value.isdigit():
        raise ProtocolError(f"the response's Content-Length is {value!r}, expected a whole number")
    return int(value)


def _chunk_size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise ProtocolError(f"a chunk's size is {line[:20]!r}, expected a hexadecimal number") from None
