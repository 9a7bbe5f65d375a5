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

    def advance(self, stream: "Stream") -> None:
        """Send as much of what waits on the stream as may be sent now."""

    def grant(self, stream: "Stream", size: int) -> None:
        """Allow the peer to send so many bytes more."""

    def reset(self, stream: "Stream", code: ErrorCode) -> None:
        """End the stream at once."""


class Stream:
    """A request and its response. Who answers requests makes a class of this one and defines ``receive`` and ``lost``.

    Sending never waits: what the peer has no room for yet is kept, and ``drained`` tells when it is gone.
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
        self.send_window = send_window  # bytes that the peer has room for
        self.receivable = receivable  # bytes that the peer may still send
        self.remote_ended = False  # whether the peer has sent all that it will
        self.over = False  # whether nothing more will be sent or is wanted
        self.unsent: deque[memoryview] | None = None
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

    # -- what the server does -----------------------------------------------------------------------------

    def headers(self, block: bytes) -> None:
        """Begin the response."""
        if not self.over:
            self.carrier.send_headers(self, block)

    def send(self, *pieces: Buffer) -> None:
        """A part of the response's body; the pieces must stay unchanged until they are sent."""
        if self.over:
            return
        if self.unsent is None:
            self.unsent = deque()
        self.unsent.extend(memoryview(piece) for piece in pieces if len(piece))
        self.carrier.advance(self)

    def end(self, block: bytes) -> None:
        """End the response with a header block, behind everything that was sent before."""
        if self.over:
            return
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
        while self.unsent and not self.over:
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
