"""A cheap HTTP client: one request, made beforehand, on one kept connection for each slot."""

import asyncio
from collections.abc import Callable
from typing import cast

from loadtests.client import Done, LengthCheck
from loadtests.http_message import BadResponse, check_response
from loadtests.http_response import ProtocolError, Response, ResponseParser

RECONNECT_DELAY_S = 0.01  # a server that refuses connections must not turn the driver into a busy loop
ERROR_TEXT_BYTES = 160


class HttpConnection(asyncio.Protocol):
    """One connection: callbacks instead of awaits, since a wake-up costs as much as the rest of a request."""

    def __init__(self, answered: Callable[[Response], None], failed: Callable[[str], None]) -> None:
        self._answered = answered
        self._failed = failed
        self._parser = ResponseParser()
        self._waiting = False
        self._transport: asyncio.Transport | None = None

    @property
    def connected(self) -> bool:
        """Whether a request can be written."""
        return self._transport is not None and not self._transport.is_closing()

    def write(self, request: bytes) -> None:
        """Send a whole request; the answer or the failure is told once."""
        assert self._transport is not None
        assert not self._waiting
        self._waiting = True
        self._transport.write(request)

    def close(self) -> None:
        """Drop the connection without telling of it."""
        self._waiting = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass of asyncio's

    def data_received(self, data: bytes) -> None:
        """Tell of the answer once it is whole."""
        try:
            response = self._parser.feed(data)
        except ProtocolError as error:
            self._fail(str(error))
            return
        if response is not None:
            self._waiting = False
            self._answered(response)

    def connection_lost(self, exc: Exception | None) -> None:
        """A request under way has failed; an idle connection is made again when it is needed."""
        self._transport = None
        self._fail(f"connection lost: {exc or 'closed by the server'}")

    def _fail(self, problem: str) -> None:
        waiting, self._waiting = self._waiting, False
        if self._transport is not None:
            self._transport.abort()
        if waiting:
            self._failed(problem)


class HttpClient:
    """The client of one run over HTTP, as client.py wants it."""

    def __init__(
        self,
        host: str,
        port: int,
        request: bytes,
        slots: int,
        *,
        exact: bool,
        check: Callable[[bytes, bytes], object] = check_response,
    ) -> None:
        self._check_first = check
        self._host = host
        self._port = port
        self._request = request
        self._exact = exact
        self._slots = slots
        self._connections: list[HttpConnection] = []
        self._connecting: set[asyncio.Task[None]] = set()

    async def open(self, done: Done) -> None:
        """See Client."""
        first = await exchange(self._host, self._port, self._request)
        if first.status != 200:
            raise BadResponse(_refusal(first))
        self._check_first(first.head, first.body)
        self._done = done
        self._check = LengthCheck(len(first.body), exact=self._exact)
        for slot in range(self._slots):
            self._connections.append(await self._connect(slot))

    def send(self, slot: int) -> None:
        """See Client."""
        connection = self._connections[slot]
        if connection.connected:
            connection.write(self._request)
            return
        task = asyncio.get_running_loop().create_task(self._send_anew(slot))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def close(self) -> None:
        """See Client."""
        for task in tuple(self._connecting):
            task.cancel()
        for connection in self._connections:
            connection.close()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    async def _connect(self, slot: int) -> HttpConnection:
        def answered(response: Response) -> None:
            problem = self._check.problem(len(response.body)) if response.status == 200 else _refusal(response)
            self._done(slot, problem)

        def failed(problem: str) -> None:
            self._done(slot, problem)

        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: HttpConnection(answered, failed), self._host, self._port)
        return connection

    async def _send_anew(self, slot: int) -> None:
        await asyncio.sleep(RECONNECT_DELAY_S)
        try:
            self._connections[slot] = await self._connect(slot)
        except OSError as error:
            self._done(slot, f"cannot connect: {error.strerror or error}")
            return
        self._connections[slot].write(self._request)


async def exchange(host: str, port: int, request: bytes) -> Response:
    """One request on a connection of its own.

    Raises:
        BadResponse: the connection broke before a whole response was there.
        OSError: nobody listens there.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Response] = loop.create_future()
    _, connection = await loop.create_connection(
        lambda: HttpConnection(answer.set_result, lambda problem: answer.set_exception(BadResponse(problem))),
        host,
        port,
    )
    connection.write(request)
    try:
        return await answer
    finally:
        connection.close()


async def get(host: str, port: int, path: str) -> Response:
    """GET one path, on a connection of its own; raises as ``exchange`` does."""
    return await exchange(host, port, f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())


def _refusal(response: Response) -> str:
    return f"status {response.status}: {response.body[:ERROR_TEXT_BYTES].decode(errors='replace')}"
