"""The responses to one request, on their way from whoever makes them to the one task that reads them."""

import asyncio
from collections import deque
from collections.abc import Callable

from headrace.core.errors import HeadraceError, InternalError
from headrace.core.request import InferResponse

WINDOW = 32  # responses that a model may make ahead of its client
WINDOW_BYTES = 4 * 1024 * 1024  # the same in bytes; one response may be larger
_REFILL = WINDOW // 2
_REFILL_BYTES = WINDOW_BYTES // 4

# A response, or an error in the place of one. After an error more may follow.
StreamItem = InferResponse | HeadraceError


class ResponseStream:
    """An async iterator over responses; what makes them is told of room for more, and when nobody reads on.

    ``decoupled`` tells whether there may be any number of responses; otherwise there is one.
    """

    def __init__(self, *, decoupled: bool) -> None:
        self.decoupled = decoupled
        self.on_room: Callable[[int, int], None] = _tell_nobody  # told of responses and their bytes
        self.on_cancel: Callable[[], None] = _tell_nobody
        self._items: deque[tuple[StreamItem, int]] = deque()
        self._read = 0  # since ``on_room`` was told last
        self._read_bytes = 0
        self._ended = False
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: StreamItem, nbytes: int = 0) -> None:
        """One more response, of which its maker counts so many bytes. Nothing happens after the end."""
        if not self._ended:
            self._items.append((item, nbytes))
            self._wake()

    def end(self) -> None:
        """There will be no more."""
        self._ended = True
        self._release()
        self._wake()

    def cancel(self) -> None:
        """Nobody reads on: what is still being made need not be. Does nothing at the end."""
        if not self._ended:
            self._ended = True
            self._items.clear()
            self.on_cancel()
            self._release()
            self._wake()

    def __aiter__(self) -> "ResponseStream":
        return self

    async def __anext__(self) -> StreamItem:
        while not self._items:
            if self._ended:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        item, nbytes = self._items.popleft()
        self._read += 1
        self._read_bytes += nbytes
        if (self._read >= _REFILL or self._read_bytes >= _REFILL_BYTES) and not self._ended:
            read, self._read = self._read, 0
            read_bytes, self._read_bytes = self._read_bytes, 0
            self.on_room(read, read_bytes)
        return item

    def _release(self) -> None:
        """Let go of those who are told, as they have this: a request's tensors are not to wait for the collector."""
        self.on_room = self.on_cancel = _tell_nobody

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _tell_nobody(*_: int) -> None:
    """Nobody wants to know."""


def single_response(future: asyncio.Future[InferResponse]) -> ResponseStream:
    """The stream of a request that is answered once, by ``future``: the response or an error, and the end."""
    stream = ResponseStream(decoupled=False)

    def on_cancel() -> None:
        future.cancel()

    stream.on_cancel = on_cancel

    def on_done(done: asyncio.Future[InferResponse]) -> None:
        if not done.cancelled():
            error = done.exception()
            if error is None:
                stream.put(done.result())
            else:
                stream.put(error if isinstance(error, HeadraceError) else InternalError(str(error)))
        stream.end()

    future.add_done_callback(on_done)
    return stream
