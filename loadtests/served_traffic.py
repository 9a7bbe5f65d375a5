"""Clients of a model that is being optimised: each waits for its answer before it asks again, over HTTP or gRPC.

Between bursts they are calm: an optimiser that takes only idle CPU would starve beside clients that never pause.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.core.tensor import Array
from loadtests import grpc_message, http_message
from loadtests.answer import BadResponse, Outputs
from loadtests.h2_connection import H2Connection
from loadtests.http_client import HttpConnection
from loadtests.http_response import Response
from loadtests.inputs import tensor_of_array
from loadtests.server import HOST

ANSWER_TIMEOUT_S = 60.0
CALM_SHARE = 0.2  # of the time in which one of all clients waits for an answer, while they are calm
LONGEST_PAUSE_S = 5.0
_RECONNECT_S = 0.05

Row = Mapping[str, Array]  # the inputs of one request


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request: when it was sent and answered (seconds of the monotonic clock), and its answer or the problem."""

    wire: str
    row: int
    sent_s: float
    answered_s: float
    answer: bytes = b""  # as it came, to be decoded when nobody is waiting
    head: bytes = b""  # of an HTTP response
    problem: str | None = None

    @property
    def latency_ms(self) -> float:
        """From the first byte sent to the last read."""
        return (self.answered_s - self.sent_s) * 1e3

    def outputs(self) -> Outputs:
        """The answer decoded.

        Raises:
            BadResponse: it makes no sense.
        """
        if self.wire == "grpc":
            return grpc_message.check_response(self.answer)
        return http_message.check_response(self.head, self.answer)


class Pace:
    """How long a client pauses: not at all in a burst, else so long that the machine is idle most of the time."""

    def __init__(self, clients: int, share: float = CALM_SHARE) -> None:
        self._factor = clients / share - 1
        self.calm = True

    def pause_s(self, latency_s: float) -> float:
        """After an answer that took so long."""
        return min(LONGEST_PAUSE_S, latency_s * self._factor) if self.calm else 0.0


class Wire(Protocol):
    """One connection of one client."""

    name: str

    async def ask(self, row: int) -> tuple[bytes, bytes]:
        """Send a row's request; the answer's head and body.

        Raises:
            BadResponse: it was refused, or the connection broke.
            OSError: nobody listens there.
        """

    def close(self) -> None:
        """Drop the connection."""


class HttpWire:
    """Binary requests over HTTP/1.1."""

    name = "http"

    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        self._port = port
        self._requests = requests
        self._connection: HttpConnection | None = None
        self._answer: asyncio.Future[Response] | None = None

    async def ask(self, row: int) -> tuple[bytes, bytes]:
        """See Wire."""
        loop = asyncio.get_running_loop()
        if self._connection is None or not self._connection.connected:
            _, self._connection = await loop.create_connection(
                lambda: HttpConnection(self._answered, self._failed), HOST, self._port
            )
        self._answer = loop.create_future()
        self._connection.write(self._requests[row])
        response = await self._answer
        if response.status != 200:
            raise BadResponse(f"status {response.status}: {response.body[:160].decode(errors='replace')}")
        return response.head, response.body

    def close(self) -> None:
        """See Wire."""
        if self._connection is not None:
            self._connection.close()

    def _answered(self, response: Response) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(response)

    def _failed(self, problem: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BadResponse(problem))


class GrpcWire:
    """ModelInfer over HTTP/2."""

    name = "grpc"

    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        self._port = port
        self._requests = requests
        self._connection: H2Connection | None = None

    async def ask(self, row: int) -> tuple[bytes, bytes]:
        """See Wire."""
        loop = asyncio.get_running_loop()
        if self._connection is None or not self._connection.usable:
            _, self._connection = await loop.create_connection(
                lambda: H2Connection(f"{HOST}:{self._port}", grpc_message.METHOD, b""), HOST, self._port
            )
            await self._connection.ready
        answer: asyncio.Future[bytes] = loop.create_future()

        def answered(message: bytes, problem: str | None) -> None:
            if answer.done():
                return
            if problem is None:
                answer.set_result(message)
            else:
                answer.set_exception(BadResponse(problem))

        self._connection.call(answered, self._requests[row])
        return b"", await answer

    def close(self) -> None:
        """See Wire."""
        if self._connection is not None:
            self._connection.close()


class Traffic:
    """All clients, from ``start`` to ``stop``, and every exchange that they had."""

    def __init__(self, model: str, rows: Sequence[Row], http_port: int, grpc_port: int, clients: int) -> None:
        tensors = [[tensor_of_array(name, array) for name, array in row.items()] for row in rows]
        http = [http_message.encode_request(f"{HOST}:{http_port}", model, one, binary=True) for one in tensors]
        grpc = [grpc_message.encode_request(model, one) for one in tensors]
        self.exchanges: list[Exchange] = []
        self.pace = Pace(2 * clients)
        self._rows = len(rows)
        self._wires: list[Wire] = []
        for _ in range(clients):
            self._wires += [HttpWire(http_port, http), GrpcWire(grpc_port, grpc)]
        self._stopped = asyncio.Event()
        self._clients: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin, calmly."""
        loop = asyncio.get_running_loop()
        self._clients = [loop.create_task(self._ask_on(wire, place)) for place, wire in enumerate(self._wires)]

    async def stop(self) -> None:
        """Let everybody have the answer that they wait for, and end.

        Raises:
            Exception: whatever a client stumbled over that is no failure of the server.
        """
        self._stopped.set()
        try:
            await asyncio.gather(*self._clients)
        finally:
            for wire in self._wires:
                wire.close()
            await asyncio.sleep(0)

    async def burst(self, seconds: float) -> tuple[float, float]:
        """Have everybody ask without pauses for so long; when that began and ended."""
        self.pace.calm = False
        began_s = time.monotonic()
        await asyncio.sleep(seconds)
        self.pace.calm = True
        return began_s, time.monotonic()

    async def _ask_on(self, wire: Wire, place: int) -> None:
        row = place * self._rows // len(self._wires)  # everybody begins elsewhere
        while not self._stopped.is_set():
            row = (row + 1) % self._rows
            exchange = await self._exchange(wire, row)
            self.exchanges.append(exchange)
            if exchange.problem is not None:
                wire.close()
                await asyncio.sleep(_RECONNECT_S)
            await self._pause(self.pace.pause_s(exchange.answered_s - exchange.sent_s))

    async def _exchange(self, wire: Wire, row: int) -> Exchange:
        sent_s = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                head, body = await wire.ask(row)
        except TimeoutError:
            problem = f"no answer within {ANSWER_TIMEOUT_S:.0f} s"
        except (BadResponse, OSError) as error:
            problem = str(error)
        else:
            return Exchange(wire.name, row, sent_s, time.monotonic(), body, head)
        return Exchange(wire.name, row, sent_s, time.monotonic(), problem=problem)

    async def _pause(self, seconds: float) -> None:
        """Wait so long, but for a burst that begins meanwhile, and the end."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0 and self.pace.calm and not self._stopped.is_set():
            await asyncio.sleep(min(left_s, 0.05))
