"""A gRPC call that brings any number of requests, which are read while it is answered."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from headrace.frontends.grpc_call import GrpcConnection, TaskCall, Terms
from headrace.frontends.grpc_head import CallHead
from headrace.frontends.grpc_message import Packed
from headrace.frontends.status import StatusCode

UNREAD_BYTES = 1024 * 1024  # of whole messages that a streaming call holds before its client has to wait
MESSAGE_BYTES = 64  # that a message takes beside what it says


class StreamingCall(TaskCall):
    """A call that brings any number of requests, and is answered by a coroutine while they come.

    The client may be ``UNREAD_BYTES`` ahead of whoever reads them, or one message. They are unpacked as they are read.
    """

    __slots__ = ("_arrived", "_unread", "_unread_bytes")

    def __init__(self, connection: GrpcConnection, stream_id: int, head: CallHead, terms: Terms) -> None:
        super().__init__(connection, stream_id, head, terms)
        self._unread: deque[Packed] = deque()
        self._unread_bytes = 0
        self._arrived: asyncio.Future[None] | None = None

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
