"""One gRPC call on its stream: messages in, messages out, and a status at the end."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any

from google.protobuf.message import DecodeError

from headrace.core.errors import DeadlineExceeded, HeadraceError, NotReady
from headrace.frontends.arrivals import Arrivals
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
from headrace.frontends.grpc_trailers import COMPRESSED, OK, RESPONSE, trailers
from headrace.frontends.status import GRPC_STATUS, StatusCode
from headrace.http2.client_frames import STREAM_WINDOW, ClientFrames
from headrace.http2.frames import ErrorCode
from headrace.http2.headers import header_block
from headrace.http2.stream import Buffer, Stream

log = logging.getLogger(__name__)

GrpcConnection = ClientFrames[CallHead]


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

    def __init__(self, connection: GrpcConnection, stream_id: int, head: CallHead, terms: Terms) -> None:
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
        self.end(trailers(status, message, alone=not self._begun))

    def lost(self) -> None:
        """The client has left, or taken its call back: nothing need be computed for it."""
        if self._timer is not None:
            self._timer.cancel()
        if self._held:
            self.hold(0)
        if self._work is not None:
            self._work.cancel()
            self._work = None  # a task that was cancelled has its frames, and by them this

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
            self.headers(COMPRESSED[self.compression] if self.compression else RESPONSE)

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
        refusal = self._terms.arrivals.change(self._held, size)
        self._held = size
        if refusal is not None:
            self.fail(refusal)

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

    def __init__(self, connection: GrpcConnection, stream_id: int, head: CallHead, terms: Terms) -> None:
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
            self._connection.respond(self, COMPRESSED[self.compression], (packed,), len(packed), OK)
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
