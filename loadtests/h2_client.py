"""A cheap gRPC client for one request, made beforehand, as client.py wants it; h2_connection.py has the protocol."""

import asyncio
from collections.abc import Callable

from loadtests.client import Done, LengthCheck
from loadtests.grpc_client import MAX_CHANNELS
from loadtests.grpc_message import METHOD, check_response
from loadtests.h2_connection import H2Connection
from loadtests.http_client import RECONNECT_DELAY_S
from loadtests.http_message import BadResponse

_CONNECT_S = 10.0


class H2Client:
    """The slots share a few connections, as those of grpc_client.py do."""

    def __init__(
        self, host: str, port: int, request: bytes, slots: int, check: Callable[[bytes], object] = check_response
    ) -> None:
        self._host = host
        self._port = port
        self._request = request
        self._check_first = check
        self._connections: list[H2Connection] = []
        self._count = min(slots, MAX_CHANNELS)
        self._connecting: set[asyncio.Task[None]] = set()

    async def open(self, done: Done) -> None:
        """See Client."""
        first = b""
        for _ in range(self._count):
            connection = await self._connect()
            self._connections.append(connection)
            first = await self._ask(connection)
        self._check_first(first)
        self._done = done
        self._check = LengthCheck(len(first), exact=True)

    def send(self, slot: int) -> None:
        """See Client."""
        connection = self._connections[slot % self._count]
        if connection.usable:
            self._call(connection, slot)
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
        await asyncio.sleep(0)

    def _call(self, connection: H2Connection, slot: int) -> None:
        def answered(message: bytes, problem: str | None) -> None:
            self._done(slot, problem or self._check.problem(len(message)))

        connection.call(answered)

    async def _connect(self) -> H2Connection:
        loop = asyncio.get_running_loop()
        address = f"{self._host}:{self._port}"
        _, connection = await loop.create_connection(
            lambda: H2Connection(address, METHOD, self._request), self._host, self._port
        )
        async with asyncio.timeout(_CONNECT_S):
            await connection.ready
        return connection

    async def _send_anew(self, slot: int) -> None:
        """Many slots may find their connection gone; the first makes it again, and the others find it there."""
        await asyncio.sleep(RECONNECT_DELAY_S)
        place = slot % self._count
        if not self._connections[place].usable:
            try:
                connection = await self._connect()
            except OSError as error:  # TimeoutError is one
                self._done(slot, f"cannot connect: {error.strerror or error}")
                return
            if self._connections[place].usable:
                connection.close()
            else:
                self._connections[place] = connection
        self._call(self._connections[place], slot)

    @staticmethod
    async def _ask(connection: H2Connection) -> bytes:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def answered(message: bytes, problem: str | None) -> None:
            if problem is None:
                answer.set_result(message)
            else:
                answer.set_exception(BadResponse(problem))

        connection.call(answered)
        return await answer
