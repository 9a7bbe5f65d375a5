"""Clients that come and go, give up or ask for nonsense: what a server meets besides its regulars."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import grpc

from loadtests import grpc_message, http_message
from loadtests.answer import BadResponse, Outputs, check_outputs
from loadtests.http_client import HttpConnection, exchange, get
from loadtests.http_response import Response
from loadtests.inputs import tensor_of_array
from loadtests.server import HOST

PER_SECOND = {"visit": 2.0, "abandon": 1.0, "bad": 1.0, "look": 0.5}  # of each kind, on average
MAX_REQUESTS = 8  # of one visit
MAX_UNDER_WAY = 64
PATIENCE_S = 0.01  # the longest that somebody waits who gives up
TIMEOUT_S = 30.0

_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)  # without it every channel would share one connection
_REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED)
_LOOKS = ("/v2", "/v2/health/ready", "/v2/models/{model}", "/v2/models/{model}/stats", "/v2/models/{model}/config")


@dataclass(frozen=True, slots=True)
class Question:
    """Rows of one model's input, and what it gives for them without a server."""

    model: str
    inputs: Outputs
    expected: Outputs


class Visitors:
    """Starts them at random times; each has a connection of its own. ``failed`` is told what went wrong.

    ``questions`` are those of each model, with its share of all that is asked.
    """

    def __init__(
        self,
        http_port: int,
        grpc_port: int,
        questions: Sequence[tuple[float, Sequence[Question]]],
        failed: Callable[[str], None],
        seed: int,
    ) -> None:
        self._host = f"{HOST}:{http_port}"
        self._http_port = http_port
        self._grpc_address = f"{HOST}:{grpc_port}"
        self._shares = [share for share, _ in questions]
        self._questions = [some for _, some in questions]
        self._failed = failed
        self._random = random.Random(seed)
        self._under_way: set[asyncio.Task[None]] = set()
        self._bad_bodies = _bad_bodies(questions[0][1][0])
        self.counts: Counter[str] = Counter()

    async def run(self) -> None:
        """Until cancelled; those under way then may finish."""
        kinds: Mapping[str, Sequence[Callable[[], Awaitable[None]]]] = {
            "visit": (self._visit_http, self._visit_http, self._visit_grpc),
            "abandon": (self._abandon_http, self._abandon_half, self._abandon_grpc),
            "bad": (self._ask_badly_http, self._ask_badly_http, self._ask_badly_grpc),
            "look": (self._look,),
        }
        try:
            while True:
                await asyncio.sleep(self._random.expovariate(sum(PER_SECOND.values())))
                (kind,) = self._random.choices(tuple(PER_SECOND), weights=tuple(PER_SECOND.values()))
                if len(self._under_way) == MAX_UNDER_WAY:
                    self._failed(f"{MAX_UNDER_WAY} visitors are under way")
                    continue
                task = asyncio.get_running_loop().create_task(self._bounded(kind, self._random.choice(kinds[kind])))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
        finally:
            if self._under_way:
                await asyncio.wait(self._under_way, timeout=TIMEOUT_S)

    async def _bounded(self, kind: str, act: Callable[[], Awaitable[None]]) -> None:
        self.counts[kind] += 1
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await act()
        except (BadResponse, OSError) as error:  # TimeoutError is one
            self._failed(f"{kind}: {error or 'no answer in time'}")
        except grpc.aio.AioRpcError as error:
            self._failed(f"{kind}: {error.code().name}: {(error.details() or '')[:160]}")

    # ---- who comes, asks and goes ----

    async def _visit_http(self) -> None:
        visitor = _HttpVisitor()
        await visitor.connect(self._http_port)
        try:
            for question, binary in self._some():
                response = await visitor.ask(self._encode(question, binary=binary))
                if response.status != 200:
                    raise BadResponse(f"status {response.status}: {response.body[:160].decode(errors='replace')}")
                check_outputs(http_message.check_response(response.head, response.body), question.expected)
                self.counts["visitors' answers"] += 1
        finally:
            visitor.leave()

    async def _visit_grpc(self) -> None:
        async with grpc.aio.insecure_channel(self._grpc_address, options=_OPTIONS) as channel:
            infer = channel.unary_unary(grpc_message.METHOD, None, None)
            for question, _ in self._some():
                answer = await infer(_message(question))
                check_outputs(grpc_message.check_response(answer), question.expected)
                self.counts["visitors' answers"] += 1

    def _some(self) -> list[tuple[Question, bool]]:
        count = self._random.randint(1, MAX_REQUESTS)
        return [(self._question(), self._random.random() < 0.5) for _ in range(count)]

    def _question(self) -> Question:
        (some,) = self._random.choices(self._questions, weights=self._shares)
        return self._random.choice(some)

    # ---- who does not wait for the answer ----

    async def _abandon_http(self) -> None:
        await self._write_and_leave(self._encode(self._question(), binary=True))

    async def _abandon_half(self) -> None:
        request = self._encode(self._question(), binary=False)
        await self._write_and_leave(request[: self._random.randrange(1, len(request))])

    async def _write_and_leave(self, data: bytes) -> None:
        visitor = _HttpVisitor()
        await visitor.connect(self._http_port)
        visitor.write(data)
        await asyncio.sleep(self._random.uniform(0, PATIENCE_S))
        visitor.leave()

    async def _abandon_grpc(self) -> None:
        async with grpc.aio.insecure_channel(self._grpc_address, options=_OPTIONS) as channel:
            call = channel.unary_unary(grpc_message.METHOD, None, None)(_message(self._question()))
            await channel.channel_ready()
            await asyncio.sleep(self._random.uniform(0, PATIENCE_S))
            call.cancel()
            with suppress(asyncio.CancelledError):  # it was answered, or is ours
                await call

    # ---- who asks for what cannot be ----

    async def _ask_badly_http(self) -> None:
        path, body = self._random.choice(self._bad_bodies)
        response = await exchange(HOST, self._http_port, http_message.post(self._host, path, body, binary=False))
        if not 400 <= response.status < 500:
            raise BadResponse(f"status {response.status} for the bad request {path} {body[:60]!r}, expected 4xx")
        self.counts[f"HTTP {response.status}"] += 1

    async def _ask_badly_grpc(self) -> None:
        question = self._questions[0][0]
        wrong = {f"not_{name}": array for name, array in question.inputs.items()}
        model, inputs = self._random.choice([("nobody", question.inputs), (question.model, wrong)])
        message = grpc_message.encode_request(model, [tensor_of_array(*entry) for entry in inputs.items()])
        async with grpc.aio.insecure_channel(self._grpc_address, options=_OPTIONS) as channel:
            try:
                await channel.unary_unary(grpc_message.METHOD, None, None)(message)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _REFUSALS:
                    raise
                self.counts[f"gRPC {error.code().name}"] += 1
                return
        raise BadResponse(
            f"a gRPC request to '{model}' with the inputs {sorted(inputs)} was answered as if it were good"
        )

    # ---- who only looks ----

    async def _look(self) -> None:
        path = self._random.choice(_LOOKS).format(model=self._question().model)
        response = await get(HOST, self._http_port, path)
        if response.status != 200:
            raise BadResponse(f"status {response.status} for {path}")

    def _encode(self, question: Question, *, binary: bool) -> bytes:
        tensors = [tensor_of_array(*entry) for entry in question.inputs.items()]
        return http_message.encode_request(self._host, question.model, tensors, binary=binary)


class _HttpVisitor:
    """One connection that is asked one thing at a time."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[Response] | None = None

    async def connect(self, port: int) -> None:
        _, self._connection = await asyncio.get_running_loop().create_connection(
            lambda: HttpConnection(self._answered, self._lost), HOST, port
        )

    async def ask(self, request: bytes) -> Response:
        self._answer = asyncio.get_running_loop().create_future()
        if not self._connection.connected:
            raise BadResponse("the connection is closed between two requests")
        self._connection.write(request)
        return await self._answer

    def write(self, data: bytes) -> None:
        """Whatever comes back is nobody's."""
        self._connection.write(data)

    def leave(self) -> None:
        self._connection.close()

    def _answered(self, response: Response) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(response)

    def _lost(self, problem: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BadResponse(problem))


def _message(question: Question) -> bytes:
    return grpc_message.encode_request(question.model, [tensor_of_array(*entry) for entry in question.inputs.items()])


def _bad_bodies(question: Question) -> list[tuple[str, bytes]]:
    """Path and body of requests that are each wrong in another way."""
    path = f"/v2/models/{question.model}/infer"
    name, array = next(iter(question.inputs.items()))
    tensor = {"name": name, "datatype": "FP32", "shape": list(array.shape), "data": array.reshape(-1).tolist()}

    def body(**changes: object) -> bytes:
        return json.dumps({"inputs": [tensor | changes]}).encode()

    return [
        ("/v2/models/nobody/infer", body()),
        (f"/v2/models/{question.model}/versions/99/infer", body()),
        (path, b"{not json"),
        (path, json.dumps({"inputs": []}).encode()),
        (path, body(datatype="INT8")),
        (path, body(datatype="FP33")),
        (path, body(shape=[1, 3])),
        (path, body(shape=[1, 3], data=[1, 2, 3])),
        (path, body(name="nothing")),
        (path, body(parameters={"binary_data_size": 1 << 20})),
        (path, body(data=["a"] * array.size)),
    ]
