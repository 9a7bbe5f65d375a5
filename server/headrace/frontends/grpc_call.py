"""One gRPC call on its stream: messages in, messages out, and a status at the end."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any
from urllib.parse import quote_from_bytes

from google.protobuf.message import DecodeError

from headrace.core.errors import DeadlineExceeded, HeadraceError, NotReady, Overloaded
from headrace.frontends.grpc_head import CallHead
from headrace.frontends.grpc_message import (
    COMPRESS_ABOVE_BYTES,
    MAX_BYTES,
    PREFIX_BYTES,
    MessageReader,
    MessageTooLarge,
    Packed,
    is_whole,
    prefixed,
    unpacked,
)
from headrace.frontends.status import GRPC_STATUS, StatusCode
from headrace.http2.connection import STREAM_WINDOW, Connection
from headrace.http2.frames import ErrorCode
from headrace.http2.headers import header_block
from headrace.http2.stream import Buffer, Stream

log = logging.getLogger(__name__)

MAX_MESSAGE_LENGTH = 2000  # of an error
MAX_ENCODED_LENGTH = 6000  # the same as it travels in the headers, of which clients take 8 KB at least
UNREAD_BYTES = 1024 * 1024  # of whole messages that a streaming call holds before its client has to wait
MESSAGE_BYTES = 64  # that a message takes beside what it says
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


class Arrivals:
    """The requests of all calls that are not whole yet: how many bytes of them there are, and may be."""

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self.max_bytes = max_bytes


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for every call: the largest message, what responses are packed with ("" for nothing), and the sum."""

    max_bytes: int
    compression: str
    arrivals: Arrivals


class Call(Stream):
    """What every kind of call has in common: its head, what has arrived of it, and its end."""

    __slots__ = (
        "_begun",
        "_connection",
        "_held",
        "_reader",
        "_terms",
        "_timer",
        "_work",
        "compression",
        "deadline_ns",
        "head",
    )

    def __init__(self, connection: Calls, stream_id: int, head: CallHead, terms: Terms) -> None:
        super().__init__(connection, stream_id, *connection.new_stream_windows())
        self._connection = connection
        self.head = head
        self._terms = terms
        self.compression = terms.compression if terms.compression in head.accepts else ""
        self.deadline_ns = monotonic_ns() + head.timeout_ns if head.timeout_ns else 0
        self._reader: MessageReader | None = None  # only for what does not come in one piece
        self._held = 0  # bytes that count among the arrivals
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
        if self._held:
            self.hold(0)
        self.end(_trailers(status, message, alone=not self._begun))

    def lost(self) -> None:
        """The client has left, or taken its call back: nothing need be computed for it."""
        if self._timer is not None:
            self._timer.cancel()
        if self._held:
            self.hold(0)
        if self._work is not None:
            self._work.cancel()

    def stop(self) -> None:
        """The server's time is over."""
        self._end_now(NotReady("the server has stopped before the call was answered"))

    def check_time(self, now_ns: int) -> None:
        """End the call if it is past its deadline."""
        if self.deadline_ns and now_ns > self.deadline_ns:
            self._expire()

    def begin_response(self) -> None:
        """Send the headers, if they are not sent yet."""
        if not self._begun:
            self._begun = True
            self.headers(_COMPRESSED[self.compression] if self.compression else RESPONSE)

    def refuse(self) -> None:
        """End a call for what its head alone says."""
        head = self.head
        if head.http_status != 200:
            self.end(header_block([(b":status", b"%d" % head.http_status)]))
        elif head.procedure is None:
            self.finish(StatusCode.UNIMPLEMENTED, f"there is no method {head.path} on this server")
        else:
            assert head.refusal is not None, "a call is refused for a reason"
            self.fail(head.refusal)

    def messages(self, data: bytes) -> list[Packed]:
        """The messages that ``data`` completes; none when the call has ended with what is wrong with them."""
        if self._reader is None:
            self._reader = MessageReader(self._terms.max_bytes)
            self.watch_deadline()
        try:
            return self._reader.feed(data)
        except (MessageTooLarge, HeadraceError) as error:
            self.fail_with(error)
        return []

    def unpack(self, message: Packed) -> bytes:
        """The message itself.

        Raises:
            MessageTooLarge: it unpacks to more than the limit.
            HeadraceError: it cannot be unpacked.
        """
        return unpacked(message, self.head.encoding, self._terms.max_bytes)

    def fail_with(self, error: MessageTooLarge | HeadraceError) -> None:
        """End the call with what is wrong with one of its messages."""
        if isinstance(error, MessageTooLarge):
            self.finish(StatusCode.RESOURCE_EXHAUSTED, str(error))
        else:
            self.fail(error)

    def hold(self, size: int) -> None:
        """Count so many bytes, and no others, of this call among those that have arrived; there may be too many."""
        arrivals = self._terms.arrivals
        grown = size - self._held
        arrivals.bytes += grown
        self._held = size
        if grown > 0 and arrivals.bytes > max(arrivals.max_bytes, size):  # one alone may be as large as any message
            self.fail(
                Overloaded(
                    f"the server holds {arrivals.bytes} bytes of gRPC requests that are not whole yet and takes at "
                    f"most {arrivals.max_bytes} (--max-inflight-bytes)"
                )
            )

    def allow_more(self) -> None:
        """Let the client go on sending a message that does not fit into the window."""
        if self.receivable < STREAM_WINDOW // 2:
            self.allow(STREAM_WINDOW - self.receivable)

    def watch_deadline(self) -> None:
        """End the call with DEADLINE_EXCEEDED when its time is over."""
        if self.deadline_ns and self._timer is None:
            delay_s = (self.deadline_ns - monotonic_ns()) * 1e-9
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        self._end_now(DeadlineExceeded("Deadline Exceeded"))

    def _end_now(self, error: HeadraceError) -> None:
        """End the call, whether its client has room for what waits to be sent or not."""
        self.fail(error)
        self.abort(ErrorCode.CANCEL)  # if it is not over: what waits was all before the error
        self.lost()


class UnaryCall(Call):
    """A call with one request; a class made of this one answers it."""

    __slots__ = ("_request",)

    def __init__(self, connection: Calls, stream_id: int, head: CallHead, terms: Terms) -> None:
        super().__init__(connection, stream_id, head, terms)
        self._request: bytes | None = None

    def answer(self, data: bytes, start: int) -> None:
        """The request is whole: ``data`` from ``start`` on."""
        raise NotImplementedError

    def receive(self, data: bytes, *, ended: bool) -> None:
        """A piece of the request."""
        if ended and self._reader is None and is_whole(data, self._terms.max_bytes):
            self.answer(data, PREFIX_BYTES)  # in one piece, as small requests are
            return
        for message in self.messages(data):
            if self._request is not None:
                self.finish(StatusCode.UNIMPLEMENTED, "a call of a procedure with one request brought more of them")
                return
            try:
                self._request = self.unpack(message)
            except (MessageTooLarge, HeadraceError) as error:
                self.fail_with(error)
                return
        if self.ended:
            return
        arriving = self._reader.size if self._reader is not None else 0
        if not ended:
            self.hold(arriving + len(self._request or b""))
            self.allow_more()
            return
        if self._held:
            self.hold(0)
        if arriving:
            self.finish(
                StatusCode.INVALID_ARGUMENT, f"the call ended in the middle of its request, {arriving} bytes in"
            )
        elif self._request is None:
            self.finish(StatusCode.UNIMPLEMENTED, "a call of a procedure with one request brought none")
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
        if size > MAX_BYTES:
            self.finish(
                StatusCode.RESOURCE_EXHAUSTED, f"the response has {size} bytes, a gRPC message can have {MAX_BYTES}"
            )
            return
        prefix = b"\0" + size.to_bytes(4, "big")
        self._connection.respond(self, RESPONSE, (prefix, *pieces), PREFIX_BYTES + size, OK)


class TaskCall(Call):
    """A call that a coroutine answers: ``serve``, of a class made of this one."""

    __slots__ = ()

    async def serve(self) -> None:
        """Answer; every error that it raises becomes the call's status."""
        raise NotImplementedError

    def run(self) -> None:
        """Begin to answer."""
        self.watch_deadline()
        self._work = asyncio.get_running_loop().create_task(self._guard())

    async def write(self, message: Any) -> None:
        """Send one response, and return when the client has had room for all that was sent before."""
        self.begin_response()
        self.send(prefixed(message.SerializeToString(), self.compression))
        await self.drained()

    async def _guard(self) -> None:
        procedure = self.head.procedure
        name = procedure.name if procedure is not None else ""
        try:
            await self.serve()
        except DecodeError as error:
            self.finish(StatusCode.INVALID_ARGUMENT, f"the request is no {name} message: {error}")
        except (MessageTooLarge, HeadraceError) as error:
            self.fail_with(error)
        except Exception:
            log.exception("%s failed", name)
            self.finish(StatusCode.INTERNAL, "the request failed; the server's log says why")


class SimpleCall(UnaryCall, TaskCall):
    """A call with one request, answered by a coroutine with one response or several."""

    __slots__ = ()

    def answer(self, data: bytes, start: int) -> None:
        """The request is whole."""
        self._request = data[start:] if start else data
        self.run()

    async def serve(self) -> None:
        """Have the procedure answer."""
        procedure = self.head.procedure
        assert procedure is not None, "a call of nothing is refused"
        answer = await procedure.answer(procedure.request.FromString(self._request), self)
        if procedure.server_streaming:
            self.begin_response()
            self.finish(StatusCode.OK)
        else:
            message = answer.SerializeToString()
            self.respond((message,), len(message))


class StreamingCall(TaskCall):
    """A call that brings any number of requests, and is answered by a coroutine while they come.

    The client may be ``UNREAD_BYTES`` ahead of whoever reads them, or one message. They are unpacked as they are read.
    """

    __slots__ = ("_arrived", "_unread", "_unread_bytes")

    def __init__(self, connection: Calls, stream_id: int, head: CallHead, terms: Terms) -> None:
        super().__init__(connection, stream_id, head, terms)
        self._unread: deque[Packed] = deque()
        self._unread_bytes = 0
        self._arrived: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Begin to answer."""
        self.run()

    def receive(self, data: bytes, *, ended: bool) -> None:
        """A piece of the requests."""
        if self.ended:
            return  # with an error, and the client has not taken all that came before it yet
        messages = self.messages(data)
        assert self._reader is not None, "it was made for the first piece"
        self._unread.extend(messages)
        self._unread_bytes += sum(MESSAGE_BYTES + len(payload) for _, payload in messages)
        if ended and self._reader.size:
            self.finish(StatusCode.INVALID_ARGUMENT, "the call ended in the middle of a request")
        if not self.ended:
            self.hold(self._reader.size + self._unread_bytes)
        if self.ended:
            self.lost()
            return
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
        self._allow_if_read()

    async def serve(self) -> None:
        """Have the procedure answer."""
        procedure = self.head.procedure
        assert procedure is not None, "a call of nothing is refused"
        await procedure.answer(self._requests(), self)
        self.begin_response()
        self.finish(StatusCode.OK)

    async def _requests(self) -> AsyncIterator[bytes]:
        while True:
            while self._unread:
                message = self._unread.popleft()
                self._unread_bytes -= MESSAGE_BYTES + len(message[1])
                self.hold(max(0, self._held - MESSAGE_BYTES - len(message[1])))
                self._allow_if_read()
                yield self.unpack(message)
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
        headers.append((b"grpc-message", _encoded(message[:MAX_MESSAGE_LENGTH])))
    return header_block(headers)


def _encoded(message: str) -> bytes:
    """A message as it travels; what it would take too much room for is left off its end."""
    while True:
        text = quote_from_bytes(message.encode("utf-8", "replace"), safe=_PRINTABLE)
        if len(text) <= MAX_ENCODED_LENGTH:
            return text.encode("ascii")
        message = message[: len(message) * MAX_ENCODED_LENGTH // len(text)]
