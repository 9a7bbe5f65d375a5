"""The forms as a server gives them: their answers, their speed, and what happens when a worker dies or they go."""

import asyncio
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import uvloop

from headrace.client import Client
from headrace.core.tensor import Array, datatype_of
from loadtests import http_message, time_slice
from loadtests.cpu import read_processes, tree_times
from loadtests.dialect import Wire
from loadtests.drive import Result, Settings, drive
from loadtests.gpu import lent
from loadtests.gpu.subjects import Inputs
from loadtests.http_client import HttpClient
from loadtests.inputs import tensor_of_array
from loadtests.server import HOST

SINGLES = 64  # clients with a row each, who wait for an answer before they ask again
SATURATING, ROWS = 16, 32  # clients with so many rows each: two make a batch, and the others wait for the worker
_WARMUP_S = 1.0
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is."""

    http_port: int
    metrics_port: int
    pid: int


def ask(address: Address, model: str, inputs: Inputs) -> Array:
    """One request's answer, of a model with one output."""
    return _answer(address, model, inputs)[1]


def _answer(address: Address, model: str, inputs: Inputs) -> tuple[str, Array]:
    with Client(f"http://{HOST}:{address.http_port}") as client:
        ((name, answer),) = client.infer(model, inputs).outputs.items()  # each exporter has its own name for it
        return name, np.asarray(answer)


def through_lent_memory(address: Address, model: str, inputs: Inputs, seconds: float) -> tuple[Array, dict[str, float]]:
    """The answer that came into memory of the GPU that is this process's, and ms of a request there and in its body."""
    output, expected = _answer(address, model, inputs)
    with Client(f"http://{HOST}:{address.http_port}") as client:
        body_ms = _median_ms(lambda: client.infer(model, inputs), seconds)
    tensors, position = _tensors("client", inputs)
    wanted = [{"name": output, "parameters": lent.place("client", expected.nbytes, position)}]
    request = {"inputs": tensors, "outputs": wanted}
    with lent.Lent(position + expected.nbytes) as memory, closing(HTTPConnection(HOST, address.http_port)) as to:
        memory.write(b"".join(array.tobytes() for array in inputs.values()))
        _demand(lent.register(to, "client", memory.handle, memory.nbytes))
        try:
            lent_ms = _median_ms(lambda: _demand(lent.post(to, f"/v2/models/{model}/infer", request)), seconds)
        finally:
            lent.post(to, "/v2/cudasharedmemory/unregister", {})
        received = np.frombuffer(memory.read()[position:], expected.dtype).reshape(expected.shape)
    return received, {"lent_ms": lent_ms, "body_ms": body_ms}


def _demand(answer: tuple[int, Any]) -> None:
    assert answer[0] == 200, answer


def _median_ms(work: Callable[[], object], seconds: float) -> float:
    taken: list[float] = []
    ends = time.monotonic() + seconds
    while not taken or time.monotonic() < ends:
        started = time.perf_counter()
        work()
        taken.append((time.perf_counter() - started) * 1000)
    return median(taken)


@contextmanager
def placed(address: Address, model: str, inputs: Inputs) -> Iterator[bytes]:
    """Put inputs into shared memory of this machine; a request that has them there, and its output behind them.

    Nothing large goes through sockets then, so that the model is what a load of it measures. Requests under way at the
    same time write their answers to the same place, where nobody reads them.
    """
    output, expected = _answer(address, model, inputs)
    file = _SHARED_MEMORY / f"headrace-gpu-{os.getpid()}"
    data = b"".join(array.tobytes() for array in inputs.values())
    tensors, position = _tensors(file.name, inputs)
    request = {
        "inputs": tensors,
        "outputs": [{"name": output, "parameters": lent.place(file.name, expected.nbytes, position)}],
    }
    file.write_bytes(data + bytes(expected.nbytes))
    try:
        with closing(HTTPConnection(HOST, address.http_port, timeout=60)) as to:
            region = {"key": f"/{file.name}", "offset": 0, "byte_size": file.stat().st_size}
            _demand(lent.post(to, f"/v2/systemsharedmemory/region/{file.name}/register", region))
            _demand(lent.post(to, f"/v2/models/{model}/infer", request))
            received = np.frombuffer(file.read_bytes()[position:], expected.dtype).reshape(expected.shape)
            off = np.linalg.norm((received - expected).astype(np.float64)) / np.linalg.norm(expected)
            assert off < 1e-2, f"through shared memory the answer is off by {off:.1e}"
            host, body = f"{HOST}:{address.http_port}", json.dumps(request).encode()
            yield http_message.post(host, f"/v2/models/{model}/infer", body, binary=False)
            _demand(lent.post(to, f"/v2/systemsharedmemory/region/{file.name}/unregister", {}))
    finally:
        file.unlink()


def _tensors(region: str, inputs: Inputs) -> tuple[list[dict[str, Any]], int]:
    """Inputs that lie in a region one behind the other, and where they end."""
    tensors, position = [], 0
    for name, array in inputs.items():
        where = lent.place(region, array.nbytes, position)
        tensors.append({"name": name, "datatype": datatype_of(array), "shape": array.shape, "parameters": where})
        position += array.nbytes
    return tensors, position


def load_up(
    address: Address, model: str, inputs: Inputs, clients: int, seconds: float, request: bytes | None = None
) -> Result:
    """Closed-loop load over HTTP: of one binary request, or of what ``placed`` gives."""
    settings = Settings(
        (HOST, address.http_port),
        Wire.HTTP_BINARY,
        model,
        clients,
        None,
        seconds,
        _WARMUP_S,
        address.pid,
        (HOST, address.metrics_port),
    )
    client = None
    if request is not None:
        client = HttpClient(HOST, address.http_port, request, clients, exact=False, check=lambda _head, _body: None)
    time_slice.shorten()
    tensors = [tensor_of_array(name, array) for name, array in inputs.items()]
    return uvloop.run(drive(settings, tensors, client))


def kill_workers_under_load(address: Address, model: str, inputs: Inputs, seconds: float) -> Result:
    """Load, and in the middle of it SIGKILL for every process of the server but its first."""

    async def both() -> Result:
        loop = asyncio.get_running_loop()
        driving = loop.run_in_executor(None, lambda: load_up(address, model, inputs, 16, seconds))
        await asyncio.sleep(_WARMUP_S + seconds / 3)
        for pid, _ in tree_times(address.pid, read_processes()).members:
            if pid != address.pid:
                os.kill(pid, signal.SIGKILL)
        return await driving

    return asyncio.run(both())


def change(address: Address, model: str, verb: str, timeout_s: float) -> None:
    """Have the server load or unload a model.

    Raises:
        ChangeRefused: it does not, and says why.
        OSError: it does not answer in time.
    """
    url = f"http://{HOST}:{address.http_port}/v2/repository/models/{model}/{verb}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data=b"{}", method="POST"), timeout=timeout_s
        ) as response:
            response.read()
    except urllib.error.HTTPError as refused:
        with refused:
            raise ChangeRefused(json.loads(refused.read())["error"]) from None


class ChangeRefused(Exception):
    """A model is not loaded or unloaded; the message is the server's."""


def metrics(address: Address) -> str:
    """The server's metrics."""
    with urllib.request.urlopen(f"http://{HOST}:{address.metrics_port}/metrics", timeout=30) as response:
        text: str = response.read().decode()
    return text
