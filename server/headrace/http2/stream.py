"""One stream of an HTTP/2 connection: what still has to be sent on it, and how much may be."""

import asyncio
from collections import deque
from typing import Protocol

from headrace.http2.frames import ErrorCode

Buffer = bytes | bytearray | memoryview


class Carrier(Protocol):
    """What a stream needs of the connection that carries it."""

    def send_headers(self, stream: "Stream", block: bytes) -> None:
        """Send a header block that does not end the stream."""

    def send_data(self, stream: "Stream", pieces: tuple[Buffer, ...]) -> None:
        """Send a part of the body, or keep it until it may be sent."""

    def advance(self, stream: "Stream") -> None:
        """Send as much of what waits on the stream as may be sent now."""

    def grant(self, stream: "Stream", size: int) -> None:
        """Allow the peer to send so many bytes more."""

    def reset(self, stream: "Stream", code: ErrorCode) -> None:
        """End the stream at once."""


class Unsent:
    """Bytes that wait to be sent, in order; ``size`` of them."""

    __slots__ = ("_pieces", "_seen", "size")

    def __init__(self) -> None:
        self._pieces: deque[memoryview] = deque()
        self._seen = 0, 0  # the size when it was last asked about, and since when it is that
        self.size = 0

    def add(self, pieces: tuple[Buffer, ...]) -> int:
        """Put pieces behind the others; how many bytes they are. They must stay unchanged until they are taken."""
        added = 0
        for piece in pieces:
            if len(piece):
                self._pieces.append(memoryview(piece))
                added += len(piece)
        self.size += added
        return added

    def take(self, size: int) -> list[memoryview]:
        """The first ``size`` bytes, of which there must be so many, or all."""
        taken: list[memoryview] = []
        size = min(size, self.size)
        self.size -= size
        while size:
            piece = self._pieces[0]
            if len(piece) <= size:
                self._pieces.popleft()
            else:
                self._pieces[0] = piece[size:]
                piece = piece[:size]
            taken.append(piece)
            size -= len(piece)
        return taken

    def stuck_ns(self, now_ns: int) -> int:
        """How long nothing has been taken, as far as those who ask this once in a while can know."""
        if self._seen[0] != self.size:
            self._seen = self.size, now_ns
        return now_ns - self._seen[1]


class Stream:
    """A request and its response. Who answers requests makes a class of this one and defines what the peer can do.

    Sending never waits: what the peer has no room for yet is kept, and ``drained`` tells when it is gone. The first
    ``end`` is the one that counts.
    """

    __slots__ = (
        "_drained",
        "carrier",
        "end_block",
        "id",
        "over",
        "receivable",
        "remote_ended",
        "send_window",
        "unsent",
    )

    def __init__(self, carrier: Carrier, stream_id: int, send_window: int, receivable: int) -> None:
        self.carrier = carrier
        self.id = stream_id
        self.send_window = send_window  # bytes that the peer has room for; below 0 when it has taken room back
        self.receivable = receivable  # bytes that the peer may still send
        self.remote_ended = False  # whether the peer has sent all that it will
        self.over = False  # whether nothing more will be sent or is wanted
        self.unsent: Unsent | None = None
        self.end_block: bytes | None = None  # the trailers, once everything before them is known
        self._drained: asyncio.Future[None] | None = None

    # -- what the peer does: for classes made of this one -------------------------------------------------

    def receive(self, data: bytes, *, ended: bool) -> None:
        """A piece of the request's body, and whether it is the last one."""
        raise NotImplementedError

    def lost(self) -> None:
        """The peer has given the request up, or the connection is gone: nothing can be sent any more."""
        raise NotImplementedError

    def stop(self) -> None:
        """The server's time is over: end the response with whatever says so."""
        raise NotImplementedError

    def check_time(self, now_ns: int) -> None:
        """Called once in a while: end what takes longer than it may."""

    # -- what the server does -----------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether the whole response is known, even if not all of it could be sent yet."""
        return self.over or self.end_block is not None

    def headers(self, block: bytes) -> None:
        """Begin the response."""
        if not self.ended:
            self.carrier.send_headers(self, block)

    def send(self, *pieces: Buffer) -> None:
        """A part of the response's body; the pieces must stay unchanged until they are sent."""
        if not self.ended:
            self.carrier.send_data(self, pieces)

    def end(self, block: bytes) -> None:
        """End the response with a header block, behind everything that was sent before."""
        if not self.ended:
            self.end_block = block
            self.carrier.advance(self)

    def allow(self, size: int) -> None:
        """Have the peer send so many bytes more."""
        if not (self.over or self.remote_ended):
            self.carrier.grant(self, size)

    def abort(self, code: ErrorCode) -> None:
        """End the stream at once, without a word of what it was about."""
        if not self.over:
            self.carrier.reset(self, code)

    async def drained(self) -> None:
        """Return when nothing waits to be sent, or never will be."""
        while self.unsent is not None and self.unsent.size and not self.over:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)

    # -- what the connection tells ------------------------------------------------------------------------

    def note_drained(self) -> None:
        """Everything is sent, or the stream is over."""
        if self._drained is not None:
            if not self._drained.done():
                self._drained.set_result(None)
            self._drained = None
