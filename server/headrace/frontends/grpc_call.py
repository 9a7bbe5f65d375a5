"""One gRPC call on its stream: messages in, messages out, and a status at the end."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from time import monotonic_ns
from typing import Any
from urllib.parse import quote_from_bytes

from google.protobuf.message import DecodeError

from headrace.core.errors import DeadlineExceeded, HeadraceError, NotReady
from headrace.frontends.grpc_head import CallHead, Procedure
from headrace.frontends.grpc_message import (
    COMPRESS_ABOVE_BYTES,
    MAX_BYTES,
    PREFIX_BYTES,
    MessageReader,
    MessageTooLarge,
    prefixed,
)
from headrace.frontends.status import GRPC_STATUS, StatusCode
from headrace.http2.connection import STREAM_WINDOW, Connection
from headrace.http2.headers import header_block
from headrace.http2.stream import Buffer, Stream

log = logging.getLogger(__name__)

MAX_MESSAGE_LENGTH = 2000  # of an error; it travels in the headers, which are bounded
UNREAD_BYTES = 1024 * 1024  # of whole messages that a streaming call holds before its client has to wait
_PRINTABLE = bytes(set(range(0x20, 0x7F)) - {0x25})  # what grpc-message holds as it is

_HEAD = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_ACCEPT = ((b"grpc-accept-encoding", b"identity,deflate,gzip"),)
RESPONSE = header_block((*_HEAD, *_ACCEPT))
OK = header_block([(b"grpc-status", b"0")])
_COMPRESSED = {
    encoding: header_block((*_HEAD, (b"grpc-encoding", encoding.encode()), *_ACCEPT))
    for encoding in ("deflate", "gzip")
}

Calls = Connection[CallHead]


class Call(Stream):
    """What every kind of call has in common: its head, and its end.

    ``compression`` is what responses are packed with, if the client can read it.
    """

    __slots__ = ("_begun", "_connection", "_reader", "_timer", "_work", "compression", "deadline_ns", "head")

    def __init__(self, connection: Calls, stream_id: int, head: CallHead, max_bytes: int, compression: str) -> None:
        super().__init__(connection, stream_id, *connection.new_stream_windows())
        self._connection = connection
        self.head = head
        self.compression = compression if compression in head.accepts else ""
        self.deadline_ns = monotonic_ns() + head.timeout_ns if head.timeout_ns else 0
        self._reader = MessageReader(max_bytes if max_bytes > 0 else MAX_BYTES, head.encoding)
        self._begun = False  # whether response headers are sent
        self._timer: asyncio.TimerHandle | None = None
        self._work: asyncio.Future[Any] | None = None  # what the answer comes from

    @property
    def metadata(self) -> Any:
        """What the client said of the call."""
        return self.head.metadata

    def fail(self, error: HeadraceError) -> None:
        """End the call with an error."""
        self.finish(GRPC_STATUS[error.kind], str(error))

    def finish(self, status: StatusCode, message: str = "") -> None:
        """End the call."""
        if self._timer is not None:
            self._timer.cancel()
        self.end(_trailers(status, message, alone=not self._begun))

    def lost(self) -> None:
        """The client has left, or taken its call back: nothing need be computed for it."""
        if self._timer is not None:
            self._timer.cancel()
        if self._work is not None:
            self._work.cancel()

    def stop(self) -> None:
        """The server's time is over."""
        self.fail(NotReady("the server has stopped before the call was answered"))
        self.lost()

    def begin_response(self) -> None:
        """Send the headers, if they are not sent yet."""
        if not self._begun:
            self._begun = True
            self.headers(_COMPRESSED[self.compression] if self.compression else RESPONSE)

    def refused(self) -> bool:
        """Whether the call's head alone had it ended."""
        head = self.head
        if head.http_status != 200:
            self.end(header_block([(b":status", b"%d" % head.http_status)]))
        elif head.procedure is None:
            self.finish(StatusCode.UNIMPLEMENTED, f"there is no method {head.path} on this server")
        elif head.refusal is not None:
            self.fail(head.refusal)
        return self.over

    def messages(self, data: bytes) -> list[bytes]:
        """The messages that ``data`` completes; none when the call has ended with what is wrong with them."""
        try:
            return self._reader.feed(data)
        except MessageTooLarge as error:
            self.finish(StatusCode.RESOURCE_EXHAUSTED, str(error))
        except HeadraceError as error:
            self.fail(error)
        return []

    def allow_more(self) -> None:
        """Let the client go on sending a message that does not fit into the window."""
        if self.receivable < STREAM_WINDOW // 2:
            self.allow(STREAM_WINDOW - self.receivable)

    def watch_deadline(self) -> None:
        """End the call with DEADLINE_EXCEEDED when its time is over."""
        if self.deadline_ns:
            delay_s = (self.deadline_ns - monotonic_ns()) * 1e-9
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        self.fail(DeadlineExceeded("Deadline Exceeded"))
        self.lost()


class UnaryCall(Call):
    """A call with one request; a class made of this one answers it."""

    __slots__ = ("_request",)

    def __init__(self, connection: Calls, stream_id: int, head: CallHead, max_bytes: int, compression: str) -> None:
        super().__init__(connection, stream_id, head, max_bytes, compression)
        self._request: bytes | None = None

    def answer(self, data: bytes, start: int) -> None:
        """The request is whole: ``data`` from ``start`` on."""
        raise NotImplementedError

    def receive(self, data: bytes, *, ended: bool) -> None:
        """A piece of the request."""
        if self.over:
            return
        if ended and self._request is None and self._reader.is_whole(data):
            self.answer(data, PREFIX_BYTES)  # in one piece, as small requests are
            return
        for message in self.messages(data):
            if self._request is not None:
                self.finish(StatusCode.UNIMPLEMENTED, "a call of a procedure with one request brought more of them")
                return
            self._request = message
        if self.over:
            return
        if not ended:
            self.allow_more()
        elif self._request is None or self._reader.size:
            self.finish(
                StatusCode.INVALID_ARGUMENT,
                f"the call ended in the middle of its request, {self._reader.size} bytes in",
            )
        else:
            self.answer(self._request, 0)

    def respond(self, pieces: Sequence[Buffer], size: int) -> None:
        """Answer with a message of ``size`` bytes in pieces, and OK."""
        if self._timer is not None:
            self._timer.cancel()
        if self.compression and size >= COMPRESS_ABOVE_BYTES:
            packed = prefixed(b"".join(pieces), self.compression)
            self._connection.respond(self, _COMPRESSED[self.compression], (packed,), len(packed), OK)
            return
        prefix = b"\0" + size.to_bytes(4, "big")
        self._connection.respond(self, RESPONSE, (prefix, *pieces), PREFIX_BYTES + size, OK)


class TaskCall(Call):
    """A call that a coroutine answers."""

    __slots__ = ()

    def run(self, answer: Coroutine[Any, Any, None]) -> None:
        """Have the coroutine answer; every error that it raises becomes the call's status."""
        self._work = asyncio.get_running_loop().create_task(self._guard(answer))

    async def write(self, message: Any) -> None:
        """Send one response, and return when the client has had room for all that was sent before."""
        self.begin_response()
        self.send(prefixed(message.SerializeToString(), self.compression))
        await self.drained()

    async def _guard(self, answer: Coroutine[Any, Any, None]) -> None:
        procedure = self.head.procedure
        name = procedure.name if procedure is not None else ""
        try:
            await answer
        except DecodeError as error:
            self.finish(StatusCode.INVALID_ARGUMENT, f"the request is no {name} message: {error}")
        except HeadraceError as error:
            self.fail(error)
        except Exception:
            log.exception("%s failed", name)
            self.finish(StatusCode.INTERNAL, "the request failed; the server's log says why")


class SimpleCall(UnaryCall, TaskCall):
    """A call with one request, answered by a coroutine with one response or several."""

    __slots__ = ()

    def answer(self, data: bytes, start: int) -> None:
        """The request is whole."""
        procedure = self.head.procedure
        assert procedure is not None, "a call of nothing is refused"
        self.watch_deadline()
        self.run(self._answer(procedure, data[start:] if start else data))

    async def _answer(self, procedure: Procedure, data: bytes) -> None:
        answer = await procedure.answer(procedure.request.FromString(data), self)
        if procedure.server_streaming:
            self.begin_response()
            self.finish(StatusCode.OK)
        else:
            message = answer.SerializeToString()
            self.respond((message,), len(message))


class StreamingCall(TaskCall):
    """A call that brings any number of requests, and is answered by a coroutine while they come.

    The client may be ``UNREAD_BYTES`` ahead of whoever reads them, or one message.
    """

    __slots__ = ("_arrived", "_unread", "_unread_bytes")

    def __init__(self, connection: Calls, stream_id: int, head: CallHead, max_bytes: int, compression: str) -> None:
        super().__init__(connection, stream_id, head, max_bytes, compression)
        self._unread: deque[bytes] = deque()
        self._unread_bytes = 0
        self._arrived: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Begin to answer."""
        procedure = self.head.procedure
        assert procedure is not None, "a call of nothing is refused"
        self.watch_deadline()
        self.run(self._serve(procedure))

    def receive(self, data: bytes, *, ended: bool) -> None:
        """A piece of the requests."""
        messages = [] if self.over else self.messages(data)
        if ended and self._reader.size and not self.over:
            self.finish(StatusCode.INVALID_ARGUMENT, "the call ended in the middle of a request")
        if self.over:
            self.lost()
            return
        self._unread.extend(messages)
        self._unread_bytes += sum(map(len, messages))
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
        self._allow_if_read()

    async def _serve(self, procedure: Procedure) -> None:
        await procedure.answer(self._requests(), self)
        self.begin_response()
        self.finish(StatusCode.OK)

    async def _requests(self) -> AsyncIterator[bytes]:
        while True:
            while self._unread:
                message = self._unread.popleft()
                self._unread_bytes -= len(message)
                self._allow_if_read()
                yield message
            if self.remote_ended:
                return
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived

    def _allow_if_read(self) -> None:
        if self._unread_bytes < UNREAD_BYTES:
            self.allow_more()


def _trailers(status: StatusCode, message: str, *, alone: bool) -> bytes:
    """The header block that ends a call, as the whole response if it is ``alone``."""
    headers = [*_HEAD, *_ACCEPT] if alone else []
    headers.append((b"grpc-status", b"%d" % status))
    if message:
        text = quote_from_bytes(message[:MAX_MESSAGE_LENGTH].encode("utf-8", "replace"), safe=_PRINTABLE)
        headers.append((b"grpc-message", text.encode("ascii")))
    return header_block(headers)
