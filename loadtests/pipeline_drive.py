"""One cell of the pipeline's load test: a process of its own asks the server, checks and measures."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count

import grpc
import numpy as np
import uvloop

from headrace.core.tensor import DATATYPE_BY_NAME, Array, Tensor, from_wire
from headrace.wire import pb
from loadtests import cpu, grpc_message
from loadtests.http_client import HttpConnection, get
from loadtests.http_message import HEADER_LENGTH, BadResponse, encode_request, header_value
from loadtests.http_response import Response
from loadtests.inputs import tensor_of_array
from loadtests.latency import LatencySummary, summarize
from loadtests.metrics import mean_batch_rows
from loadtests.pipeline_models import TOLERANCE, caller_of, ensemble_of
from loadtests.server import HOST

ANSWER_TIMEOUT_S = 60.0

Ask = Callable[[int], Awaitable[Array]]  # the number of a picture to its scores


class Way(StrEnum):
    """Who calls the steps, and how requests travel."""

    ENSEMBLE_HTTP = "ensemble http"
    ENSEMBLE_GRPC = "ensemble grpc"
    CALLER_HTTP = "python model http"
    CLIENT_HTTP = "client http"  # three requests, one after the other


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the matrix."""

    net: str
    concurrency: int
    way: Way


@dataclass(frozen=True, slots=True)
class Job:
    """What the driver of one cell needs to know."""

    cell: Cell
    http_port: int
    grpc_port: int
    metrics_port: int
    server_pid: int
    seconds: float
    warmup_s: float
    pictures: tuple[bytes, ...]
    scores: Array  # of each picture


@dataclass(frozen=True, slots=True)
class Measured:
    """One cell, from the first request after the warm-up to the last answer: nothing is cut off at either end.

    CPU time is that of a request, ``batch_rows`` the rows an execution of each step, None where none is known.
    """

    requests: int
    requests_per_s: float
    latency: LatencySummary
    errors: dict[str, int]
    server_cpu_us: float
    client_cpu_us: float
    batch_rows: dict[str, float | None]
    server_processes_gone: int


class _Line:
    """A kept connection to ask on, one request at a time."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[Response] | None = None

    async def open(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        _, self._connection = await loop.create_connection(lambda: HttpConnection(self._done, self._failed), HOST, port)

    async def ask(self, request: bytes) -> dict[str, Tensor]:
        """The answer's outputs by name."""
        if not self._connection.connected:
            raise BadResponse("the server has closed the connection")
        self._answer = asyncio.get_running_loop().create_future()
        self._connection.write(request)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return outputs_of(await self._answer)
        except TimeoutError:
            self._connection.close()  # the answer may come yet, and would be taken for the next one's
            raise

    def _done(self, response: Response) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(response)

    def _failed(self, problem: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BadResponse(problem))


def outputs_of(response: Response) -> dict[str, Tensor]:
    """The outputs of a binary answer.

    Raises:
        BadResponse: it is an error, or its parts do not fit together.
    """
    length = header_value(response.head, HEADER_LENGTH)
    if response.status != 200 or length is None:
        raise BadResponse(f"status {response.status}: {response.body[:160].decode(errors='replace')}")
    outputs, position = {}, int(length)
    for output in json.loads(response.body[:position])["outputs"]:
        end = position + int(output["parameters"]["binary_data_size"])
        data = memoryview(response.body)[position:end]
        datatype = DATATYPE_BY_NAME[output["datatype"]]
        outputs[output["name"]] = Tensor(output["name"], datatype, tuple(output["shape"]), data)
        position = end
    if position != len(response.body):
        raise BadResponse(f"the answer has {len(response.body)} bytes, its outputs tell of {position}")
    return outputs


async def _http_ask(job: Job, files: Sequence[Tensor]) -> Ask:
    line = _Line()
    await line.open(job.http_port)
    host, net = f"{HOST}:{job.http_port}", job.cell.net

    async def three_times(picture: int) -> Array:
        pixels = (await line.ask(encode_request(host, "decode", [files[picture]], binary=True)))["pixels"]
        data = Tensor("data", pixels.datatype, pixels.shape, pixels.data)
        logits = (await line.ask(encode_request(host, net, [data], binary=True)))["logits"]
        outputs = await line.ask(encode_request(host, "best", [logits], binary=True))
        return _array(outputs["scores"])

    if job.cell.way is Way.CLIENT_HTTP:
        return three_times
    model = ensemble_of(net) if job.cell.way is Way.ENSEMBLE_HTTP else caller_of(net)
    requests = [encode_request(host, model, [file], binary=True) for file in files]

    async def once(picture: int) -> Array:
        return _array((await line.ask(requests[picture]))["scores"])

    return once


def _array(tensor: Tensor) -> Array:
    return from_wire(tensor.data, tensor.datatype, tensor.shape)


def _grpc_ask(job: Job, files: Sequence[Tensor]) -> Ask:
    # A subchannel of its own: without it every channel of the process would share one connection.
    channel = grpc.aio.insecure_channel(f"{HOST}:{job.grpc_port}", options=(("grpc.use_local_subchannel_pool", 1),))
    infer = channel.unary_unary(grpc_message.METHOD, None, None)
    requests = [grpc_message.encode_request(ensemble_of(job.cell.net), [file]) for file in files]

    async def once(picture: int) -> Array:
        try:
            answer = pb.ModelInferResponse.FromString(await infer(requests[picture], timeout=ANSWER_TIMEOUT_S))
        except grpc.aio.AioRpcError as error:
            raise BadResponse(f"{error.code().name}: {(error.details() or '')[:160]}") from None
        place = [output.name for output in answer.outputs].index("scores")
        return np.frombuffer(answer.raw_output_contents[place], np.float32).reshape(answer.outputs[place].shape)

    return once


class _Tally:
    """What came of the requests of one phase."""

    def __init__(self) -> None:
        self.latencies_ns: list[int] = []
        self.errors: Counter[str] = Counter()

    async def one(self, ask: Ask, picture: int, expected: Array) -> None:
        """Ask once; count it as good only if the answer is right."""
        started_ns = time.monotonic_ns()
        try:
            scores = await ask(picture)
        except (BadResponse, OSError, TimeoutError, KeyError, ValueError) as error:
            self.errors[f"{type(error).__name__}: {error}"] += 1
            await asyncio.sleep(0.01)  # a server that refuses must not turn the driver into a busy loop
            return
        self.latencies_ns.append(time.monotonic_ns() - started_ns)
        if scores.shape != (1, len(expected)) or not np.allclose(scores[0], expected, rtol=0, atol=TOLERANCE):
            self.errors["the scores are not those of the picture"] += 1


async def _phase(job: Job, asks: Sequence[Ask], seconds: float) -> _Tally:
    """All clients at once, each asking until the time is over; gone on with when all are answered."""
    tally, numbers = _Tally(), count()
    end_ns = time.monotonic_ns() + int(seconds * 1e9)

    async def client(ask: Ask) -> None:
        while time.monotonic_ns() < end_ns:
            picture = next(numbers) % len(job.pictures)
            await tally.one(ask, picture, job.scores[picture])

    await asyncio.gather(*map(client, asks))
    return tally


async def _drive(job: Job) -> Measured:
    files = [tensor_of_array("file", np.array([[picture]], np.object_)) for picture in job.pictures]
    over_grpc = job.cell.way is Way.ENSEMBLE_GRPC
    asks = [_grpc_ask(job, files) if over_grpc else await _http_ask(job, files) for _ in range(job.cell.concurrency)]
    await _phase(job, asks, job.warmup_s)
    page = (await get(HOST, job.metrics_port, "/metrics")).body.decode()
    tree = cpu.tree_times(job.server_pid, cpu.read_processes())
    started_ns, own_ns = time.monotonic_ns(), time.process_time_ns()
    tally = await _phase(job, asks, job.seconds)
    elapsed_ns, own_ns = time.monotonic_ns() - started_ns, time.process_time_ns() - own_ns
    tree_after = cpu.tree_times(job.server_pid, cpu.read_processes())
    page_after = (await get(HOST, job.metrics_port, "/metrics")).body.decode()
    requests = len(tally.latencies_ns)
    if not requests:
        raise BadResponse(f"{job.cell}: no answer within {job.seconds} s: {'; '.join(tally.errors)}")
    return Measured(
        requests=requests,
        requests_per_s=requests / elapsed_ns * 1e9,
        latency=summarize(tally.latencies_ns),
        errors=dict(tally.errors),
        server_cpu_us=(tree_after.cpu_us - tree.cpu_us) / requests,
        client_cpu_us=own_ns / requests / 1e3,
        batch_rows={model: mean_batch_rows(page, page_after, model) for model in ("decode", job.cell.net, "best")},
        server_processes_gone=cpu.left(tree, tree_after),
    )


def drive(job: Job) -> Measured:
    """Measure one cell.

    Raises:
        BadResponse: nothing was answered.
        OSError: nobody listens there, or the server's process is gone.
    """
    return uvloop.run(_drive(job))
