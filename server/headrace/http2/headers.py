"""Header blocks (HPACK, RFC 7541): read with a memory for those that come again, written without any state."""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from hpack import Decoder
from hpack.exceptions import HPACKError
from hpack.table import HeaderTable

from headrace.http2.frames import ConnectionFault, ErrorCode

ADVERTISED_BYTES = 64 * 1024  # of all headers of one request together; one that has more is refused
MAX_HEADER_BYTES = (
    2 * ADVERTISED_BYTES
)  # packed and unpacked; to read more would take too long, and the connection ends
_REMEMBERED = 256  # blocks of one connection
_REMEMBERED_BYTES = 1024  # the longest of them
_REMEMBERED_HEADERS_BYTES = 4096  # what is in them; a byte in a block can stand for a whole table
_RESIZE = 0b001  # how a block begins that changes the table's size (RFC 7541, section 6.3)
NO_TABLE = b"\x20"  # the same with size 0, for the blocks that this end sends
_MAX_RESIZES = 2  # more never say anything: the smallest size in between, and the last one (section 4.2)

Headers = list[tuple[bytes, bytes]]
Head = TypeVar("Head")


class HeadersTooLarge(Exception):
    """A request has more headers than it may, which were read all the same: the next ones build on them."""


class _WatchedTable(HeaderTable):
    """A dynamic table that counts what is put into it."""

    changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        """Put a header into the table."""
        self.changes += 1
        super().add(name, value)


class HeaderReader(Generic[Head]):
    """Reads the header blocks of one connection, each into whatever ``parse`` makes of its headers.

    A client sends the same few headers with each of its requests, and once they are in the dynamic table the same
    few bytes. Those are looked up instead of being read again: reading them costs as much as the rest of a small
    request. ``parse`` must depend on nothing but the headers.
    """

    def __init__(self, parse: Callable[[Headers], Head]) -> None:
        self._parse = parse
        self._decoder = Decoder(max_header_list_size=MAX_HEADER_BYTES)
        self._table = _WatchedTable()
        self._decoder.header_table = self._table
        self._remembered: dict[bytes, Head] = {}
        self._changes = 0

    def read(self, block: bytes) -> Head:
        """What ``parse`` made of the block.

        Raises:
            HeadersTooLarge: it has more than ``ADVERTISED_BYTES``.
            ConnectionFault: the block cannot be read, so that nothing after it can be either.
        """
        head = self._remembered.get(block)
        if head is not None:
            return head
        if len(block) > MAX_HEADER_BYTES:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"headers of more than {MAX_HEADER_BYTES} bytes")
        resized = bool(block) and block[0] >> 5 == _RESIZE
        if resized:
            _check_resizes(block)
        try:
            headers = self._decoder.decode(block, raw=True)
        except HPACKError as error:
            what = f"a header block cannot be read: {type(error).__name__}"
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, what) from error
        given = [(bytes(name), bytes(value)) for name, value in headers]
        size = sum(len(name) + len(value) for name, value in given)
        if size > ADVERTISED_BYTES:
            self._remembered.clear()
            raise HeadersTooLarge
        head = self._parse(given)
        if resized or self._table.changes != self._changes:
            # Only while the table stays as it is, equal blocks mean equal headers.
            self._changes = self._table.changes
            self._remembered.clear()
        elif len(block) <= _REMEMBERED_BYTES and size <= _REMEMBERED_HEADERS_BYTES:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[block] = head
        return head


def _check_resizes(block: bytes) -> None:
    """See that a block does not begin with changes of the table's size without end, each of which takes its time."""
    position = 0
    for _ in range(_MAX_RESIZES):
        if position < len(block) and block[position] >> 5 == _RESIZE:
            long = block[position] & 0x1F == 0x1F
            position += 1
            while long and position < len(block):
                long = block[position] >= 0x80
                position += 1
    if position < len(block) and block[position] >> 5 == _RESIZE:
        raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "a header block changes the table's size again and again")


def header_block(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers as a block that is the same at any time and on any connection.

    Nothing goes into the peer's dynamic table, so blocks can be made once and sent for ever.
    """
    pieces = []
    for name, value in headers:
        if name == b":status" and value == b"200":
            pieces.append(b"\x88")
        else:
            pieces += (b"\x00", _length(len(name)), name, _length(len(value)), value)
    return b"".join(pieces)


def _length(value: int) -> bytes:
    """The length of a string without Huffman coding: an integer with a prefix of seven bits."""
    if value < 0x7F:
        return bytes((value,))
    rest = value - 0x7F
    encoded = bytearray((0x7F,))
    while rest >= 0x80:
        encoded.append(rest & 0x7F | 0x80)
        rest >>= 7
    encoded.append(rest)
    return bytes(encoded)
