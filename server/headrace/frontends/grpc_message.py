"""Messages as gRPC puts them into a stream: a flag and a length in front of each (gRPC over HTTP/2)."""

from headrace.core.errors import HeadraceError, InvalidRequest, TooLarge, Unsupported
from headrace.wire.compression import compress, decompress

PREFIX_BYTES = 5
MAX_BYTES = 2**31 - 1  # of any message, as in other implementations
# Below this compressing costs more than the bytes it saves.
COMPRESS_ABOVE_BYTES = 512
# A message may unpack to this much, or to so many times its size: gzip can make a gigabyte of one megabyte, which costs
# seconds and twice the memory.
FREE_BYTES = 64 * 1024 * 1024
MOST_TIMES = 100
ENCODINGS = ("identity", "deflate", "gzip")
# Pieces smaller than this are joined, so many at a time: each has a size of its own beside what it holds.
_CRUMB_BYTES = 1024
_CRUMBS = 256

Packed = tuple[int, bytes]  # a message's flag, and the message as it came


class MessageTooLarge(Exception):
    """A message is over the limit that the server was given."""


def is_whole(data: bytes, max_bytes: int) -> bool:
    """Whether ``data`` is one message, not compressed and within the limit."""
    return (
        len(data) >= PREFIX_BYTES
        and not data[0]
        and int.from_bytes(data[1:PREFIX_BYTES], "big") == len(data) - PREFIX_BYTES <= max_bytes
    )


class MessageReader:
    """Cuts the bytes of a stream into messages of up to ``max_bytes``. Each byte is copied once, or twice in crumbs."""

    __slots__ = ("_chunks", "_crumbs", "_flag", "_has", "_max_bytes", "_prefix", "_wants")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._prefix = b""  # as much of it as there is
        self._flag = 0
        self._wants = -1  # bytes of the message; -1 before its prefix is whole
        self._has = 0
        self._chunks: list[bytes] = []
        self._crumbs: list[bytes] = []

    @property
    def size(self) -> int:
        """Bytes of a message that is not whole yet."""
        return len(self._prefix) + self._has

    def feed(self, data: bytes) -> list[Packed]:
        """The messages that ``data`` completes, still compressed where they are.

        Raises:
            MessageTooLarge: the next one is.
            HeadraceError: what comes next is no message.
        """
        messages: list[Packed] = []
        position = 0
        while True:
            if self._wants < 0:
                begin, position = position, min(len(data), position + PREFIX_BYTES - len(self._prefix))
                self._prefix += data[begin:position]
                if len(self._prefix) < PREFIX_BYTES:
                    return messages
                self._begin()
            taken = min(self._wants - self._has, len(data) - position)
            if taken:
                self._add(data[position : position + taken])
                position += taken
            if self._has < self._wants:
                return messages
            messages.append((self._flag, self._end()))

    def _begin(self) -> None:
        self._flag = self._prefix[0]
        self._wants = int.from_bytes(self._prefix[1:], "big")
        if self._flag > 1:
            raise InvalidRequest(
                f"a message begins with {self._flag}, expected 0 or 1, which says that it is compressed"
            )
        if self._wants > self._max_bytes:
            raise MessageTooLarge(f"Received message larger than max ({self._wants} vs. {self._max_bytes})")

    def _add(self, piece: bytes) -> None:
        self._has += len(piece)
        if len(piece) >= _CRUMB_BYTES and not self._crumbs:
            self._chunks.append(piece)
            return
        self._crumbs.append(piece)
        if len(piece) >= _CRUMB_BYTES or len(self._crumbs) >= _CRUMBS:
            self._chunks.append(b"".join(self._crumbs))
            self._crumbs.clear()

    def _end(self) -> bytes:
        chunks = [*self._chunks, *self._crumbs]
        message = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._prefix, self._wants, self._has = b"", -1, 0
        self._chunks.clear()
        self._crumbs.clear()
        return message


def unpacked(message: Packed, encoding: str, max_bytes: int) -> bytes:
    """The message itself; ``encoding`` is what the call says that its messages have.

    Raises:
        MessageTooLarge: it unpacks to more than the limit, or than anything of its size may.
        HeadraceError: it cannot be unpacked.
    """
    flag, payload = message
    if not flag:
        return payload
    if encoding in ("", "identity"):
        raise InvalidRequest("a message is said to be compressed, and the call names no grpc-encoding")
    limit = min(max_bytes, max(FREE_BYTES, MOST_TIMES * len(payload)))
    try:
        return decompress(payload, encoding, limit)
    except TooLarge:
        raise MessageTooLarge(
            f"Received message larger than max (unpacked, more than {limit}, which {len(payload)} packed may come to)"
        ) from None


def check_encoding(encoding: str) -> HeadraceError | None:
    """What is wrong with a call's grpc-encoding."""
    if encoding in ("", *ENCODINGS):
        return None
    return Unsupported(f"grpc-encoding '{encoding}' is not supported; accepted are {', '.join(ENCODINGS)}")


def prefixed(message: bytes, encoding: str = "") -> bytes:
    """A message with its prefix, compressed when an encoding is given and it pays."""
    if encoding and len(message) >= COMPRESS_ABOVE_BYTES:
        message = compress([message], encoding)
        return b"\x01" + len(message).to_bytes(4, "big") + message
    return b"\x00" + len(message).to_bytes(4, "big") + message
