"""The responses to one request, on their way from whoever makes them to the one task that reads them."""

import asyncio
from collections import deque
from collections.abc import Callable

from headrace.core.errors import HeadraceError
from headrace.core.request import InferResponse

WINDOW = 32  # responses that a model may make ahead of its client
_REFILL = WINDOW // 2

# A response, or an error in the place of one. After an error more may follow.
StreamItem = InferResponse | HeadraceError


class ResponseStream:
    """An async iterator over responses; what makes them is told of room for more, and when nobody reads on.

    ``decoupled`` tells whether there may be any number of responses; otherwise there is one.
    """

    def __init__(self, *, decoupled: bool) -> None:
        self.decoupled = decoupled
        self.on_room: Callable[[int], None] = lambda _: None
        self.on_cancel: Callable[[], None] = lambda: None
        self._items: deque[StreamItem] = deque()
        self._read = 0
        self._ended = False
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: StreamItem) -> None:
        """One more response. Nothing happens after the end, or when nobody reads on."""
        if not self._ended:
            self._items.append(item)
            self._wake()

    def end(self) -> None:
        """There will be no more."""
        self._ended = True
        self._wake()

    def cancel(self) -> None:
        """Nobody reads on: what is still being made need not be. Does nothing at the end."""
        if not self._ended:
            self._ended = True
            self._items.clear()
            self.on_cancel()
            self._wake()

    def __aiter__(self) -> "ResponseStream":
        return self

    async def __anext__(self) -> StreamItem:
        while not self._items:
            if self._ended:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        item = self._items.popleft()
        self._read += 1
        if self._read % _REFILL == 0 and not self._ended:
            self.on_room(_REFILL)
        return item

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
