"""Messages as gRPC puts them into a stream: a flag and a length in front of each (gRPC over HTTP/2)."""

from headrace.core.errors import HeadraceError, InvalidRequest, Unsupported
from headrace.wire.compression import compress, decompress

PREFIX_BYTES = 5
MAX_BYTES = 2**31 - 1  # of any message, as in other implementations
# Below this compressing costs more than the bytes it saves.
COMPRESS_ABOVE_BYTES = 512
ENCODINGS = ("identity", "deflate", "gzip")


class MessageTooLarge(Exception):
    """A message is over the limit that the server was given."""


class MessageReader:
    """Cuts the bytes of a stream into messages of up to ``max_bytes``, and unpacks those that are compressed."""

    __slots__ = ("_chunks", "_encoding", "_max_bytes", "_size")

    def __init__(self, max_bytes: int, encoding: str) -> None:
        self._max_bytes = max_bytes
        self._encoding = encoding
        self._chunks: list[bytes] = []
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes of a message that is not whole yet."""
        return self._size

    def is_whole(self, data: bytes) -> bool:
        """Whether ``data`` is one message, not compressed and within the limit, and nothing came before it."""
        return (
            not self._size
            and len(data) >= PREFIX_BYTES
            and not data[0]
            and int.from_bytes(data[1:PREFIX_BYTES], "big") == len(data) - PREFIX_BYTES <= self._max_bytes
        )

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that ``data`` completes.

        Raises:
            MessageTooLarge: the next one is.
            HeadraceError: one cannot be unpacked.
        """
        if data:
            self._chunks.append(data)
            self._size += len(data)
        messages: list[bytes] = []
        while self._size >= PREFIX_BYTES:
            if len(self._chunks[0]) < PREFIX_BYTES:
                self._chunks = [b"".join(self._chunks)]
            first = self._chunks[0]
            length = int.from_bytes(first[1:PREFIX_BYTES], "big")
            if length > self._max_bytes:
                raise MessageTooLarge(f"Received message larger than max ({length} vs. {self._max_bytes})")
            if self._size < PREFIX_BYTES + length:
                break
            whole = first if len(self._chunks) == 1 else b"".join(self._chunks)
            end = PREFIX_BYTES + length
            messages.append(self.unpacked(whole[0], whole[PREFIX_BYTES:end]))
            self._chunks = [whole[end:]] if len(whole) > end else []
            self._size -= end
        return messages

    def unpacked(self, flag: int, payload: bytes) -> bytes:
        """The message itself.

        Raises:
            MessageTooLarge: it unpacks to more than the limit.
            HeadraceError: it cannot be unpacked.
        """
        if not flag:
            return payload
        if flag != 1:
            raise InvalidRequest(f"a message begins with {flag}, expected 0 or 1, which says that it is compressed")
        if self._encoding in ("", "identity"):
            raise InvalidRequest("a message is said to be compressed, and the call names no grpc-encoding")
        return decompress(payload, self._encoding, self._max_bytes)


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
