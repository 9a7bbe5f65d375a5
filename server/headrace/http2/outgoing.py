"""The sending half of an HTTP/2 connection: responses within the peer's windows, in turns where room is short."""

import asyncio
from collections.abc import Sequence

from headrace.http2 import frames
from headrace.http2.frames import ConnectionFault, ErrorCode
from headrace.http2.stream import Buffer, Stream, Unsent

TRANSPORT_BYTES = 1024 * 1024  # handed to the transport before the client reads; the rest waits on its stream
TURN_BYTES = 64 * 1024  # of one stream, before the next one that waits for the same room has its turn
JOIN_BYTES = 64 * 1024  # copying so little costs less than a second buffer on its way through the transport
GATHERED_BYTES = 256 * 1024  # of responses that leave together
SMALL_BYTES = 4 * 1024  # the same where one frame follows the other, and many buffers leave together


class Outgoing(asyncio.Protocol):
    """What all streams of a connection send through.

    A stream with something to send waits either for its own window, then nothing is noted of it here, or for what it
    shares with others: the connection's window and the transport. Those are in ``_waiting``, first come first.
    """

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}
        self._send_window = frames.DEFAULT_WINDOW
        self._initial_send_window = frames.DEFAULT_WINDOW
        self._frame_bytes = frames.DEFAULT_FRAME_BYTES
        self._whole_bytes = frames.DEFAULT_FRAME_BYTES  # of a body that fits into one frame; none when full
        self._full = False  # the transport has as much as it should have
        self._waiting: dict[int, Stream] = {}
        self._unsent_bytes = 0  # on all streams
        self._leaving = False  # no more streams are taken
        self._gathered: list[bytes] = []  # whole responses that are about to leave together
        self._gathered_bytes = 0
        self._before_block = b""  # what the next header block has to begin with

    # -- what streams do ----------------------------------------------------------------------------------

    def respond(self, stream: Stream, block: bytes, pieces: Sequence[Buffer], size: int, end_block: bytes) -> None:
        """Send a whole response of ``size`` bytes: in one write where the client has room for all of it."""
        if stream.over:
            return
        if size > self._send_window or size > stream.send_window or size > self._whole_bytes or self._before_block:
            stream.headers(block)
            stream.send(*pieces)
            stream.end(end_block)
            return
        self._send_window -= size
        number = stream.id.to_bytes(4, "big")
        buffers = (
            *(len(block).to_bytes(3, "big"), b"\x01\x04", number, block),  # HEADERS, END_HEADERS
            *(size.to_bytes(3, "big"), b"\x00\x00", number, *pieces),  # DATA
            *(len(end_block).to_bytes(3, "big"), b"\x01\x05", number, end_block),  # HEADERS, END_STREAM too
        )
        if size > JOIN_BYTES:
            self._flush()
            self.transport.writelines(buffers)
        elif self._gathered or len(self._streams) > 1:
            self._gather(b"".join(buffers))
        else:
            self.transport.write(b"".join(buffers))
        self._finish(stream)

    def _gather(self, response: bytes) -> None:
        """Send a response together with those that come in the same turn of the loop.

        A batch is answered in one turn, and many of its requests are of one connection. A write apart is a third of
        what a small response costs.
        """
        self._gathered.append(response)
        self._gathered_bytes += len(response)
        if self._gathered_bytes > GATHERED_BYTES:
            self._flush()
        elif len(self._gathered) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Send what was gathered."""
        if self._gathered:
            together = b"".join(self._gathered)
            self._gathered.clear()
            self._gathered_bytes = 0
            self.transport.write(together)

    def _announced(self, block: bytes) -> bytes:
        """A header block, behind what the client must know before it reads it."""
        before, self._before_block = self._before_block, b""
        return before + block

    def send_headers(self, stream: Stream, block: bytes) -> None:
        """Send a header block that does not end the stream."""
        block = self._announced(block)
        self.transport.write(frames.header(len(block), frames.HEADERS, frames.END_HEADERS, stream.id) + block)

    def send_data(self, stream: Stream, pieces: tuple[Buffer, ...]) -> None:
        """Send a part of the body, or keep it until it may be sent."""
        if stream.unsent is None:
            stream.unsent = Unsent()
        self._unsent_bytes += stream.unsent.add(pieces)
        self.advance(stream)

    def advance(self, stream: Stream) -> None:
        """Send as much of what waits on the stream as may be sent now, its end behind it."""
        unsent = stream.unsent
        if unsent is not None and unsent.size:
            self._send_frames(stream, unsent, unsent.size)
            if unsent.size:
                if stream.send_window > 0:
                    self._waiting[stream.id] = stream
                return
        if stream.end_block is None:
            stream.note_drained()
            return
        block = self._announced(stream.end_block)
        flags = frames.END_HEADERS | frames.END_STREAM
        self.transport.write(frames.header(len(block), frames.HEADERS, flags, stream.id) + block)
        self._finish(stream)

    def grant(self, stream: Stream, size: int) -> None:
        """Allow the peer to send so many bytes more."""
        stream.receivable += size
        self.transport.write(frames.window_update(stream.id, size))

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """End the stream at once."""
        self.transport.write(frames.rst_stream(stream.id, code))
        self._forget(stream)

    # -- what makes room ----------------------------------------------------------------------------------

    def resume_writing(self) -> None:
        """The transport has room again."""
        self._full = False
        self._whole_bytes = self._frame_bytes
        self._send_waiting()

    def pause_writing(self) -> None:
        """The transport has enough."""
        self._full = True
        self._whole_bytes = -1

    def _send_waiting(self) -> None:
        """Give the streams that wait for what they share their turns, for as long as there is room."""
        waiting = self._waiting
        while waiting and self._send_window > 0 and not self._full:
            stream = waiting.pop(next(iter(waiting)))
            unsent = stream.unsent
            assert unsent is not None, "what waits has something to send"
            self._send_frames(stream, unsent, TURN_BYTES)
            if not unsent.size:
                self.advance(stream)
            elif stream.send_window > 0:
                waiting[stream.id] = stream

    def _resize_windows(self, size: int) -> None:
        """The client has changed the window that streams begin with, and so that of each which is open."""
        change = size - self._initial_send_window
        if not change:
            return
        self._initial_send_window = size
        for stream in self._streams.values():
            stream.send_window += change
            if stream.send_window > frames.MAX_WINDOW:
                raise ConnectionFault(
                    ErrorCode.FLOW_CONTROL_ERROR, f"the window of stream {stream.id} grows to {stream.send_window}"
                )
        if change > 0:
            for stream in [one for one in self._streams.values() if one.unsent is not None and one.unsent.size]:
                self.advance(stream)

    def _set_frame_bytes(self, size: int) -> None:
        self._frame_bytes = size
        if not self._full:
            self._whole_bytes = size

    # -- ends ---------------------------------------------------------------------------------------------

    def _send_frames(self, stream: Stream, unsent: Unsent, limit: int) -> None:
        """Send up to ``limit`` bytes, if there is room for them."""
        while limit > 0 and unsent.size and not self._full:
            size = min(self._send_window, stream.send_window, self._frame_bytes, limit, unsent.size)
            if size <= 0:
                return
            self._send_window -= size
            stream.send_window -= size
            self._unsent_bytes -= size
            limit -= size
            buffers: list[Buffer] = [frames.header(size, frames.DATA, 0, stream.id), *unsent.take(size)]
            if size <= SMALL_BYTES:
                self.transport.write(b"".join(buffers))
            else:
                self.transport.writelines(buffers)

    def _finish(self, stream: Stream) -> None:
        """The response is sent whole."""
        if not stream.remote_ended:
            # Nobody will look at the rest of the request: have the client stop sending it.
            self._flush()
            self.transport.write(frames.rst_stream(stream.id, ErrorCode.NO_ERROR))
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        """The stream is over."""
        stream.over = True
        self._streams.pop(stream.id, None)
        if stream.unsent is not None:
            self._unsent_bytes -= stream.unsent.size
            stream.unsent = None
            self._waiting.pop(stream.id, None)
            stream.note_drained()
        if self._leaving and not self._streams:
            self._close()

    def _close(self) -> None:
        """Everything that was to be sent is."""
        raise NotImplementedError
